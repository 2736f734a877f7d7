"""Rewards: on noisy latents (``LatentReward``), on decoded pixels (``PixelReward``, ``AestheticReward``); losses."""

from prfl.reward.aesthetic import AestheticReward as AestheticReward
from prfl.reward.aesthetic import load_aesthetic as load_aesthetic
from prfl.reward.checkpoint import RewardCard as RewardCard
from prfl.reward.ensemble import RewardEnsemble as RewardEnsemble
from prfl.reward.head import RewardHead as RewardHead
from prfl.reward.latent import LatentReward as LatentReward
from prfl.reward.latent import RewardAdapter as RewardAdapter
from prfl.reward.pixel import PixelNetwork as PixelNetwork
from prfl.reward.pixel import PixelReward as PixelReward
from prfl.reward.scores import Normalisation as Normalisation
from prfl.reward.scores import total as total
