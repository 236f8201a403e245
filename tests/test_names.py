"""What a method is called, from its parts and from a trainer."""

from fedlight import FederatedTrainer
from fedlight.algorithms import FedAvg, FedDyn, FedSAM
from fedlight.callbacks import MAN
from fedlight.perturbations import SAM
from fedlight.run.names import dotted, method_name, smaller_is_better
from fedlight.server.aggregators import Median


def test_the_parts_are_joined():
    assert method_name("FedAvg") == "FedAvg"
    assert method_name("FedDyn", ["SAM", "Krum"], ["MAN"]) == "FedDyn+SAM+Krum+MAN"
    assert method_name("FedDyn", ["SAM", None], ["MAN"], centralized=True) == "Central+SAM+MAN"


def test_a_trainer_knows_its_name():
    assert FederatedTrainer().method_name == "FedAvg"
    assert FederatedTrainer(aggregator=Median()).method_name == "FedAvg+Median"
    assert FederatedTrainer(FedSAM(), callbacks=[MAN()]).method_name == "FedSAM+MAN"
    assert FederatedTrainer(FedDyn(), SAM(), callbacks=[MAN(zeta=0.0)]).method_name == "FedDyn+SAM"
    assert FederatedTrainer(FedAvg(), centralized=True, aggregator=Median()).method_name == "Central"


def test_dotted_keys():
    nested = {"a": {"b": 1, "c": {"d": [1, {"e": 2}]}}, "f": None, "g": {}}
    assert dotted(nested) == {"a.b": 1, "a.c.d": [1, {"e": 2}], "f": None, "g": {}}


def test_spread_cost_and_sharpness_are_better_small():
    small = ("val/loss", "clients/accuracy_std", "time/round_s", "comm/up_mb", "hessian/lambda_max", "privacy/epsilon")
    small += ("val/cross_entropy", "val/hinge", "val/brier_score", "val/bpc", "val/nrmse", "val/msle", "val/eer")
    assert all(map(smaller_is_better, small))
    assert not any(
        map(smaller_is_better, ("val/accuracy", "clients/accuracy_p10", "val/f1", "val/acc_norm", "runtime"))
    )
