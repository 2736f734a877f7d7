"""The chain, guidance, plans of where gradient flows, and the walk back along them."""

from prfl.rollout.chain import Network as Network
from prfl.rollout.chain import Trajectory as Trajectory
from prfl.rollout.chain import coarse as coarse
from prfl.rollout.chain import rollout as rollout
from prfl.rollout.guidance import guided_network as guided_network
from prfl.rollout.plan import Edge as Edge
from prfl.rollout.plan import Plan as Plan
from prfl.rollout.plan import chain_plan as chain_plan
from prfl.rollout.plan import clean_jump as clean_jump
from prfl.rollout.plan import clean_node as clean_node
from prfl.rollout.plan import full_chain as full_chain
from prfl.rollout.plan import jump_edge as jump_edge
from prfl.rollout.plan import last_steps as last_steps
from prfl.rollout.plan import leap_edge as leap_edge
from prfl.rollout.plan import one_step as one_step
from prfl.rollout.plan import step_edge as step_edge
from prfl.rollout.plan import unit_steps as unit_steps
from prfl.rollout.walk import HeldEdge as HeldEdge
from prfl.rollout.walk import WalkStats as WalkStats
from prfl.rollout.walk import hold_edge as hold_edge
from prfl.rollout.walk import target_latents as target_latents
from prfl.rollout.walk import walk_back as walk_back
