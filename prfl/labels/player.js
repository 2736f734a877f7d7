// Two videos beside each other: paused, slowed, stepped and placed together.

const SPEEDS = [1, 0.5, 0.25];

const RELOAD = 3000; // ms until a video that a server did not give is asked for again

// sides: the two video elements.  videos: by file, {src, fps}.  find: a control by its name.
function player(sides, videos, find, server) {
  let speed = 0;

  function load(pair) {
    find("broken").hidden = true;
    for (const video of sides) {
      const file = pair[video.id];
      if (video.dataset.file !== file) {
        video.dataset.file = file;
        video.src = videos[file].src;
      }
    }
    replay();
  }

  function play() {
    sides.forEach((video) => video.play().catch(() => {})); // a new source interrupts the one before
  }

  function replay() {
    sides.forEach((video) => (video.currentTime = 0));
    play();
    find("at").value = 0;
  }

  function stop() {
    sides.forEach((video) => video.pause());
  }

  function pause() {
    if (sides.some((video) => video.paused)) play();
    else stop();
  }

  function applySpeed() {
    for (const video of sides) video.playbackRate = video.defaultPlaybackRate = SPEEDS[speed]; // of the next source too
    find("speed").textContent = ["Speed 1\u00d7", "Speed \u00bd\u00d7", "Speed \u00bc\u00d7"][speed];
  }

  function slower() {
    speed = (speed + 1) % SPEEDS.length;
    applySpeed();
  }

  // To the middle of the next frame or the one before: on its edge a browser may show either.
  function step(by) {
    stop();
    for (const video of sides) {
      const { fps } = videos[video.dataset.file];
      const frame = Math.floor(video.currentTime * fps + 1e-3) + by;
      const last = Math.max(0, Math.round(video.duration * fps) - 1);
      video.currentTime = (Math.min(Math.max(frame, 0), last) + 0.5) / fps;
    }
  }

  // share: of the longer video; the shorter one stands at its end behind that.
  function place(share) {
    stop();
    const longest = Math.max(...sides.map((video) => video.duration || 0));
    for (const video of sides) video.currentTime = Math.min(share * longest, video.duration || 0);
  }

  for (const video of sides) {
    video.onloadedmetadata = () => {
      find("broken").hidden = true;
      const shape = video.videoWidth / video.videoHeight;
      video.parentElement.parentElement.classList.toggle("wide", shape > 1.1);
    };
    video.onplay = video.onpause = () => {
      find("pause").textContent = sides.some((one) => one.paused) ? "Play" : "Pause";
    };
    video.onerror = () => {
      const { file } = video.dataset;
      find("broken").hidden = false;
      find("broken").textContent = `${file} cannot be shown` + (server ? "; trying again." : " by this browser.");
      if (server) setTimeout(() => file === video.dataset.file && video.load(), RELOAD);
    };
    video.ontimeupdate = () => {
      const longer = sides[0].duration >= sides[1].duration ? sides[0] : sides[1];
      if (video === longer && document.activeElement !== find("at")) {
        find("at").value = (1000 * video.currentTime) / (video.duration || 1);
      }
    };
  }
  find("at").oninput = () => place(find("at").value / 1000);
  find("at").onchange = () => find("at").blur();
  applySpeed();
  return { load, pause, place, replay, slower, step, stop };
}
