"""Personal parts against plain torch, with every kind of method beside them, in every engine, and what is refused."""

import copy
import warnings

import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from fedlight import algorithms
from fedlight.algorithms import FedAvg
from fedlight.algorithms.fedmuon import Muon
from fedlight.cli.command import FederatedCLI
from fedlight.local import LocalObjective
from fedlight.module.parameters import ParameterLayout
from fedlight.penalties.man import MAN
from fedlight.personal import PersonalParts
from fedlight.personal.split import Split
from fedlight.perturbations import ASAM, LESAM, SAM
from fedlight.run.loggers import read_metrics
from fedlight.server.sampling import Sampler
from fedlight.transforms import ClipUpdate, DifferentialPrivacy, TopK
from tests.helpers.tiny import SIZES, Clients, Keep, Regression, quiet_trainer

ROUNDS = ((0, 2, 3), (1, 2), (0, 1))


class Listed(Sampler):
    """The clients of the test's rounds."""

    def sample(self, round, rng):
        return list(ROUNDS[round])


class Decayed(Regression):
    """A body and a head, trained with momentum and weight decay, which move what has no gradient."""

    def __init__(self, net=None, dtype=torch.float32):
        super().__init__(0.1, (net or nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))).to(dtype))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9, weight_decay=0.1)


def trained(root, personal=None, model=None, data=None, ckpt_path=None, **settings):
    """A trainer that has trained, and its module."""
    model = Decayed() if model is None else model
    quick = {"enable_plots": False, "enable_checkpointing": False, "client_val_every_n_rounds": 0}
    defaults = {"max_rounds": 3, "local_epochs": 2, "sampler": Listed(), "accelerator": "cpu", **quick}
    trainer = quiet_trainer(root, **{**defaults, "personal": personal, **settings})
    trainer.fit(model, data or Clients(), ckpt_path=ckpt_path)
    return trainer, model


def rows(trainer):
    """The server's vectors and every client's rows."""
    federation, found = trainer.federation, {}
    found |= {f"server/{k}": v for k, v in federation.state.algorithm.items()}
    found |= {f"views/{k}": v for k, v in federation.state.views.items()}
    for client in federation.store.clients():
        for part in ("algorithm", "perturbation", "personal", "buffers", "latest", "transforms"):
            state = federation.store.get(client, part) or {}
            found |= {f"{client}/{part}/{k}": v for k, v in state.items()}
    return found


def flat(module):
    """Its parameters as one vector."""
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


# What the papers do, with a copy of the module for each client and optimizers of what is trained.


def local(module, names, data, epochs):
    """Local epochs of full batches on the parameters of these names, as plain torch has them."""
    chosen = [p for n, p in module.named_parameters() if n.startswith(names)]
    for parameter in module.parameters():
        parameter.requires_grad_(any(parameter is p for p in chosen))
    optimizer, (x, y) = torch.optim.SGD(chosen, 0.1, momentum=0.9, weight_decay=0.1), data
    for _ in range(epochs):
        optimizer.zero_grad()
        (module(x) - y).square().mean().backward()
        nn.utils.clip_grad_norm_(chosen, 0.5)
        optimizer.step()


def twin(phases, personal):
    """The mean of all parts after the last round, shared and personal, and every client's personal parts."""
    data = Clients(dtype=torch.float64)
    server, clients = Decayed(dtype=torch.float64), {}
    for selected in ROUNDS:
        models = {}
        for i in selected:
            models[i] = copy.deepcopy(server)
            own = clients.get(i, dict(Decayed(dtype=torch.float64).named_parameters()))
            models[i].load_state_dict({n: own[n] for n in own if n.startswith(personal)}, strict=False)
            for names, epochs in phases:
                local(models[i], names, data.datasets[i].batch(torch.arange(SIZES[i])), epochs)
            clients[i] = {n: p.detach() for n, p in models[i].named_parameters() if n.startswith(personal)}
        total = sum(SIZES[i] for i in selected)
        mean = {
            n: sum(SIZES[i] * models[i].get_parameter(n).detach() for i in selected) / total
            for n, _ in server.named_parameters()
        }
        server.load_state_dict(mean)
    return mean, clients


HEAD, BODY, ALL = ("net.2",), ("net.0",), ("net",)
TWINS = {
    "FedPer": (PersonalParts("head"), [(ALL, 2)], HEAD),
    "FedRep": (PersonalParts("head", "alternating", epochs=3), [(HEAD, 3), (BODY, 2)], HEAD),
    "LG-FedAvg": (PersonalParts("body"), [(ALL, 2)], BODY),
    "FedBABU": (PersonalParts("head", "frozen"), [(BODY, 2)], HEAD),
}


@pytest.mark.parametrize("name", TWINS)
def test_methods_are_those_of_plain_torch(name, tmp_path):
    personal, phases, names = TWINS[name]
    data, settings = Clients(batch_size=12, dtype=torch.float64), {"precision": "64-true", "gradient_clip_val": 0.5}
    trainer, model = trained(tmp_path, personal, Decayed(dtype=torch.float64), data, **settings)
    mean, clients = twin(phases, names)
    for n, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), mean[n], rtol=0, atol=1e-10)
    for client, parts in clients.items():
        expected = torch.cat([p.reshape(-1) for p in parts.values()])
        kept = trainer.federation.store.get(client, "personal")
        found = trainer.federation.clients.initial if name == "FedBABU" else kept["params"]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_draws_of_the_two_trainings_differ(tmp_path, monkeypatch):
    orders, draw = [], torch.randperm

    def drawn(n, generator):
        orders.append(draw(n, generator=generator).tolist())
        return torch.tensor(orders[-1])

    monkeypatch.setattr(torch, "randperm", drawn)
    trained(tmp_path, PersonalParts("head", "alternating"), max_rounds=1, local_epochs=1)
    first, second = [order for order in orders if len(order) == 8]  # of client 2
    assert first != second


# With every kind of method beside them.


class Matrices(Decayed):
    """Trained with Muon, which asks for matrices."""

    def configure_optimizers(self):
        return Muon(self.parameters(), 0.02)


BESIDE = {
    "FedDyn, SAM": {"algorithm": algorithms.FedDyn, "perturbation": SAM},
    "SCAFFOLD, ASAM, MAN": {"algorithm": algorithms.SCAFFOLD, "perturbation": ASAM, "callbacks": lambda: [MAN(0.1)]},
    "FedProx, LESAM": {"algorithm": algorithms.FedProx, "perturbation": LESAM},
    "FedSMOO": {"algorithm": algorithms.FedSMOO},
    "FedWMSAM": {"algorithm": algorithms.FedWMSAM},
    "FedVARP, TopK": {"algorithm": algorithms.FedVARP, "transforms": lambda: [TopK(0.5)]},
    "FedAvg, ClipUpdate": {"transforms": lambda: [ClipUpdate(0.05)]},
    "FedMuon": {"algorithm": algorithms.FedMuon, "model": Matrices},
}
QUICK = (("SCAFFOLD, ASAM, MAN", "together"), ("FedWMSAM", "alternating"))
BOTH = [(name, train) for name in BESIDE for train in ("together", "alternating")]


@pytest.mark.parametrize(
    ("name", "train"), [pytest.param(*b, marks=[pytest.mark.slow] * (b not in QUICK)) for b in BOTH]
)
def test_methods_beside_personal_parts(name, train, tmp_path):
    """Every method trains, sends no more than what is shared, is resumed to the bit, and is the same side by side."""
    settings = {key: make() for key, make in BESIDE[name].items() if key != "model"}
    settings |= {"views": ["server", "all"], "limit_val_batches": 0}
    model, personal = BESIDE[name].get("model", Decayed), PersonalParts("head", train)
    whole, _ = trained(tmp_path, personal, model(), **settings)
    found, initial = rows(whole), flat(Decayed().net[2])
    assert all(value.isfinite().all() for value in found.values())
    assert whole.federation.state.algorithm["params"].shape == (16,)
    heads = [found[f"{i}/personal/params"] for i in range(4)]
    assert all(not torch.equal(head, heads[0]) and head.shape == (5,) for head in heads[1:])
    assert not any(torch.equal(head, initial) for head in heads)
    for i in range(4):  # the latest models have the clients' own heads
        assert torch.equal(found[f"{i}/latest/params"][16:], heads[i])
    trained(tmp_path, personal, model(), name="killed", max_rounds=1, enable_checkpointing=True, **settings)
    resumed, _ = trained(tmp_path, personal, model(), name="killed", ckpt_path="last", **settings)
    assert_same_bits(rows(resumed), found)
    if name not in ("FedMuon", "SCAFFOLD, ASAM, MAN"):
        aside, _ = trained(tmp_path, personal, model(), engine="vmap", **settings)
        for key, value in rows(aside).items():
            torch.testing.assert_close(value, found[key], rtol=1e-4, atol=1e-5)


def test_only_the_gradient_moves_personal_entries():
    """The algorithm asks for something else of w_1 and w_3 alone; w_0 and w_2 follow their gradient."""
    layout = ParameterLayout.of(nn.ParameterList([nn.Parameter(torch.zeros(())) for _ in range(4)]))
    split = Split(layout, torch.tensor([True, False, True, False]))
    shared, own = torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])
    asked = LocalObjective(shared, anchor=shared + 1, proximal=0.5, linear=torch.tensor([3.0, 4.0]), gradient_scale=2.0)
    whole = split.objective(asked, own)
    assert whole.start.tolist() == [10, 1, 20, 2]
    gradient, params = torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([11.0, 4.0, 22.0, 7.0])
    # 2·1 + 3 + 0.5·(4 − 2) and 2·1 + 4 + 0.5·(7 − 3)
    assert whole.correct(gradient, params).tolist() == [1, 6, 1, 8]
    assert split.restricted({"v": params, "n": torch.tensor(3.0)})["v"].tolist() == [4, 7]
    assert split.padded({"v": shared})["v"].tolist() == [0, 1, 0, 2]
    assert [info.offset for info in split.layout.parameters] == [0, 1]


def test_a_perturbation_has_its_radius_in_what_is_trained(tmp_path):
    """The head has moved since the last round, and is frozen while the body trains: it has no share of the norm."""
    keep = Keep()
    trained(tmp_path, PersonalParts("head", "alternating"), algorithm=keep, perturbation=LESAM(0.3), engine="eager")
    last = {result.client: result.perturbation["epsilon"] for result in keep.rounds[-1]}
    assert last[0][-5:].tolist() == [0.0] * 5
    assert float(last[0].norm()) == pytest.approx(0.3)


@pytest.mark.parametrize("algorithm", [FedAvg, algorithms.FedDyn])
def test_frozen_parts_are_frozen_parameters(algorithm, tmp_path):
    """What is shared is trained as if the head had no gradient, also by weight decay, momentum and clipping."""
    settings = {"precision": "64-true", "gradient_clip_val": 0.5, "enable_plots": False, "perturbation": SAM(0.1)}
    data, frozen = Clients(dtype=torch.float64), Decayed(dtype=torch.float64)
    frozen.net[2].requires_grad_(False)
    settings["algorithm"], parts = algorithm(), PersonalParts("head", "frozen")
    one, module = trained(tmp_path, parts, Decayed(dtype=torch.float64), data, **settings)
    other, _ = trained(tmp_path, None, frozen, data, **settings)
    torch.testing.assert_close(one.federation.state.algorithm, other.federation.state.algorithm, rtol=0, atol=1e-12)
    assert torch.equal(flat(module.net[2]), flat(Decayed(dtype=torch.float64).net[2]))


def test_clients_that_are_all_the_same_make_personal_parts_the_shared_ones(tmp_path):
    data = Clients(sizes=(6, 6, 6), batch_size=6, dtype=torch.float64)
    data.datasets = [data.datasets[0]] * 3
    settings = {"precision": "64-true", "enable_plots": False, "sampler": None, "clients_per_round": 1.0}
    one, _ = trained(tmp_path, ".*weight", Decayed(dtype=torch.float64), data, **settings)
    other, _ = trained(tmp_path, None, Decayed(dtype=torch.float64), data, **settings)
    torch.testing.assert_close(one.federation.params, other.federation.params, rtol=0, atol=1e-12)


# What is kept, counted and evaluated.


def with_norm():
    return Decayed(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)))


def test_buffers_of_personal_modules_stay_with_the_client_and_others_do_not(tmp_path):
    settings = {"max_rounds": 2, "views": ["server"]}
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    trainer, _ = trained(tmp_path, "net.1", Decayed(net), Clients((6, 12, 8, 7)), **settings)
    federation = trainer.federation
    kept = [federation.store.get(i, "buffers") for i in range(4)]
    assert all(set(k) == {"net.1.running_mean", "net.1.running_var", "net.1.num_batches_tracked"} for k in kept)
    federation.begin()
    tasks = [federation.clients.task(i, None) for i in (0, 1)]
    assert not torch.equal(*(t.buffers["net.1.running_mean"] for t in tasks))
    assert torch.equal(tasks[0].buffers["net.1.running_mean"], kept[0]["net.1.running_mean"])
    assert torch.equal(*(t.buffers["net.2.running_mean"] for t in tasks))
    row = read_metrics(trainer.run_dir / "metrics.csv")[-1]
    crosses = 4 * (37 - 8 + 8) + 8  # float32 parameters and statistics that are shared, and an int64 counter
    assert row["comm/up_mb"] == row["comm/down_mb"] == pytest.approx(2 * crosses / 1e6)


def test_what_is_shown_of_personal_parts(tmp_path, capsys):
    """The mean of the round's clients in the views, and in all that reads the module's weights."""
    trainer, module = trained(tmp_path, ["head"], views=["server", "selected", "all", "swa"], enable_checkpointing=True)
    federation = trainer.federation
    (a, b), (n, m) = [federation.store.get(i, "personal")["params"].double() for i in ROUNDS[-1]], SIZES[:2]
    mean = ((n * a + m * b) / (n + m)).float()
    for view in ("server", "selected"):
        torch.testing.assert_close(federation.state.views[view][16:], mean, rtol=0, atol=1e-7)
    assert torch.equal(flat(module.net[2]), federation.params[16:])
    saved = torch.load(trainer.run_dir / "checkpoints" / "last.ckpt", weights_only=False, mmap=True)["state_dict"]
    assert torch.equal(saved["net.2.bias"], module.net[2].bias.detach())
    latest = sum(SIZES[i] * federation.store.get(i, "latest")["params"].double() for i in range(4)) / sum(SIZES)
    torch.testing.assert_close(federation.state.views["all"], latest.float(), rtol=0, atol=1e-6)
    tested = trainer.test(Decayed(), Clients(), ckpt_path="last", verbose=False)[0]
    assert tested["test/loss_all"] != tested["test/loss"]
    trainer.export(Decayed(), Clients(), ckpt_path="last", to=tmp_path / "model.pt")
    assert torch.equal(torch.load(tmp_path / "model.pt")["net.2.bias"], module.net[2].bias.detach())
    said = "2 of 4 tensors, 5 of 21 parameters: net.2.weight, net.2.bias; together;"
    assert trainer.facts["personal"].startswith(said)


def test_privacy_keeps_the_clients_parts_out_of_the_server_s_model(tmp_path):
    pytest.importorskip("dp_accounting")
    settings = {"sampler": None, "clients_per_round": 2, "views": ["server"], "limit_val_batches": 0}
    private = DifferentialPrivacy(0.2, noise_multiplier=1.0)
    trainer, module = trained(tmp_path, "head", transforms=[private], **settings)
    assert torch.equal(flat(module.net[2]), flat(Decayed().net[2]))
    assert not torch.equal(trainer.federation.store.get(0, "personal")["params"], flat(Decayed().net[2]))
    assert trainer.facts["personal"].endswith("together; the server's model has them as they were initialised")


def test_a_run_from_python_is_run_again_from_its_configuration(tmp_path):
    trainer, _ = trained(tmp_path, "net.2", max_rounds=1)
    settings = yaml.safe_load((trainer.run_dir / "config.yaml").read_text())["trainer"]
    assert settings["personal"] == {
        "class_path": "fedlight.personal.parts.PersonalParts",
        "init_args": {"parts": "net.2", "train": "together", "epochs": 1},
    }
    plain, _ = trained(tmp_path, None, with_norm(), Clients((6, 12, 8, 7)), algorithm=algorithms.FedBN(), max_rounds=1)
    assert yaml.safe_load((plain.run_dir / "config.yaml").read_text())["trainer"]["personal"] is None


def test_a_resume_with_other_parts_is_refused(tmp_path):
    trained(tmp_path, "head", max_rounds=1, enable_checkpointing=True)
    with pytest.raises(MisconfigurationException, match=r"personal\.train: together in the checkpoint, frozen"):
        trained(tmp_path, PersonalParts("head", "frozen"), ckpt_path="last")
    with pytest.raises(MisconfigurationException, match=r"trainer\.personal: .* in the checkpoint, None here"):
        trained(tmp_path, ckpt_path="last")


# What parts are called, and what is refused.


class Tied(Decayed):
    """The last layer has the weights of the first one."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Linear(3, 1)))
        self.net[2].weight = self.net[0].weight


@pytest.mark.parametrize(
    ("parts", "model", "names"),
    [
        ("head", Decayed, ["net.2.weight", "net.2.bias"]),
        ("body", Decayed, ["net.0.weight", "net.0.bias"]),
        ("net.0", Decayed, ["net.0.weight", "net.0.bias"]),
        ("net.0.bias", Decayed, ["net.0.bias"]),
        (r"net\.\d\.bias", Decayed, ["net.0.bias", "net.2.bias"]),
        ("BatchNorm", with_norm, ["net.1.weight", "net.1.bias"]),
        ("torch.nn.BatchNorm1d", with_norm, ["net.1.weight", "net.1.bias"]),
        (["net.1", "net.2.bias"], with_norm, ["net.1.weight", "net.1.bias", "net.2.bias"]),
        ("net.(0|2).weight", Tied, ["net.0.weight"]),
    ],
)
def test_what_parts_are_called(parts, model, names):
    module, personal = model(), PersonalParts(parts)
    layout = ParameterLayout.of(module)
    personal.setup(module, layout)
    assert [i.name for i in layout.parameters if personal.entries[i.offset]] == names
    assert all(name.startswith("net.1.") for name in personal.buffers)
    assert len(personal.buffers) == 3 * ("net.1.weight" in names)


def test_names_of_compiled_modules():
    """As `torch.compile` has them, of which the import alone takes seconds."""
    module, compiled = Decayed(), nn.Module()
    compiled._orig_mod, module.net[2] = module.net[2], compiled
    layout, personal = ParameterLayout.of(module), PersonalParts("net.2")
    personal.setup(module, layout)
    assert personal.entries.sum() == 5


@pytest.mark.parametrize(
    ("settings", "model", "message"),
    [
        ({"personal": "nett"}, Decayed, "'nett' means nothing in Decayed: .* There are net, net.0, net.2"),
        ({"personal": "2"}, Decayed, "'2' means nothing in Decayed: .* There are net.2, net, net.0"),
        ({"personal": ["net.0", "[a"]}, Decayed, r"'\[a' means nothing"),
        ({"personal": "torch.nn.Conv9d"}, Decayed, "means nothing"),
        ({"personal": "net"}, Decayed, "takes all 4 trained parameters, and nothing is left"),
        ({"personal": "net.0"}, Tied, "takes net.0.weight, and net.2.weight is the same tensor"),
        ({"personal": "net.1.weight"}, with_norm, "takes net.1.weight and leaves net.1.bias, net.1.num_batches"),
        ({"personal": "net.1.running_.*"}, with_norm, "and leaves net.1.bias"),
        ({"personal": []}, Decayed, r"parts=\[\] must be names"),
        ({"personal": [nn.Linear]}, Decayed, "must be names, such as .*'torch.nn.BatchNorm2d'"),
        ({"personal": "head", "centralized": True}, Decayed, "trainer.personal: with trainer.centralized"),
        ({"personal": "head", "algorithm": algorithms.FedBN()}, Decayed, "trainer.personal: FedBN brings its own"),
        ({"personal": "head", "algorithm": algorithms.FedAdamW()}, Decayed, "trainer.personal: FedAdamW lets all"),
    ],
)
def test_what_cannot_be_is_refused(settings, model, message, tmp_path):
    with pytest.raises(MisconfigurationException, match=message):
        quiet_trainer(tmp_path, **settings).fit(model(), Clients())
    assert not (tmp_path / "default").exists()


@pytest.mark.parametrize(("train", "epochs"), [("both", 1), ("together", 0), ("alternating", 1.5), ("frozen", True)])
def test_settings_are_checked(train, epochs):
    with pytest.raises(MisconfigurationException, match=r"trainer\.personal: (train|epochs)="):
        PersonalParts("head", train, epochs)


@pytest.mark.slow
def test_a_command_line_names_parts_and_configurations(tmp_path):
    """A name of what is shipped, or a list of patterns."""
    arguments = ["fit", "-c", "quickstart", f"--trainer.default_root_dir={tmp_path}", "--trainer.fast_dev_run=true"]
    cases = ("fedrep", ["head"], "alternating"), ("[.*bias, head]", [".*bias", "head"], "together")
    for given, parts, train in cases:
        with warnings.catch_warnings(action="ignore"):
            cli = FederatedCLI([*arguments, f"--trainer.personal={given}"])
        assert (cli.trainer.personal.parts, cli.trainer.personal.train) == (parts, train)
        assert cli.trainer.facts["personal"]
