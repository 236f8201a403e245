"""Every algorithm, found by discovery, gives the same state in every engine."""

import pytest
import torch

from fedlight.engines.cuda_graph.engine import CudaGraph
from fedlight.engines.vmap.engine import Vmap
from tests.contracts.combinations import ALGORITHMS, combinations, outcome, run
from tests.engines.tape import Tape

ENGINES = {"vmap": Vmap, "cuda_graph": lambda: CudaGraph(slots=2, recorder=Tape)}
COMBINATIONS = [c for c in combinations() if c.perturbation == "none" and c.penalty == "MAN"]
COMBINATIONS = [c for c in COMBINATIONS if not ALGORITHMS[c.algorithm].optimizer_state]  # which are eager's alone


@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
def test_engines_agree(combination, tmp_path):
    expected = outcome(run(combination, tmp_path)[0])
    for name, engine in ENGINES.items():
        found = outcome(run(combination, tmp_path, engine=engine())[0])
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6, msg=f"{name}: {key}")
