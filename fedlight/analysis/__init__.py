"""Curvature of a model: the Hessian's spectrum, layer by layer, and the landscape of the loss."""

from fedlight.analysis.hessian import clients_lambda_max, hessian_operator, measure_hessian
from fedlight.analysis.lanczos import Eigenpairs, block_eigenvalues, top_eigenvalues
from fedlight.analysis.layers import layer_blocks
from fedlight.analysis.operators import HessianOperator, NonFiniteLossError, NoSecondDerivativeError
from fedlight.analysis.result import HessianResult
from fedlight.analysis.stochastic import Density, TraceEstimate, density, trace
from fedlight.analysis.task import TaskLoss, task_loss

# What to measure on, what to measure, what comes out, and what goes wrong.
__all__ = ["HessianOperator", "TaskLoss", "hessian_operator", "layer_blocks", "task_loss"]
__all__ += ["block_eigenvalues", "clients_lambda_max", "density", "measure_hessian", "top_eigenvalues"]
__all__ += ["trace", "Density", "Eigenpairs", "HessianResult", "TraceEstimate"]
__all__ += ["NoSecondDerivativeError", "NonFiniteLossError"]
