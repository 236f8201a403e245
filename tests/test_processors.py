"""How cores are shared: processes, and threads of each."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from fedlight.engines.vmap import Vmap
from fedlight.run import processes as _processes
from fedlight.run.loggers import read_metrics
from fedlight.run.processes import LARGE_STEP, num_processes, step_flop
from tests.helpers.runif import RunIf
from tests.helpers.tiny import Clients, Regression, quiet_trainer, seeded


@pytest.mark.parametrize(
    ("flop", "steps", "clients", "rounds", "cores", "expected"),
    [
        (1e5, 150, 10, 30, 2, 1),  # two seconds: a second process would take longer to start
        (1e5, 150, 10, 5000, 2, 2),  # five minutes of steps that a second thread does not help
        (1e5, 150, 3, 5000, 16, 3),  # no more processes than clients
        (4e9, 500, 10, 1, 2, 2),  # the paper's network
        (4e9, 500, 10, 500, 32, 10),
        (4e9, 500, 1, 500, 8, 1),  # one client, or central training: threads
        (4e9, 500, 10, 500, 1, 1),
    ],
)
def test_processes(flop, steps, clients, rounds, cores, expected):
    assert num_processes(flop, steps, clients, rounds, cores) == expected


@pytest.mark.parametrize("flop", [LARGE_STEP, 1e11])
@pytest.mark.parametrize("cores", [1, 2, 3, 64])
def test_processes_of_large_steps_do_not_depend_on_the_number_of_rounds(flop, cores):
    """They share the cores as threads: a run that is continued would round differently from then on."""
    assert len({num_processes(flop, 100, 10, rounds, cores) for rounds in (1, 10, 10_000, 10**8)}) == 1


def test_flop_of_a_step():
    """Three passes; 2·B·in·out for a dense layer, 2·B·out·in·k²·positions for a convolution."""
    x, y = seeded(5, 3), seeded(5)
    assert step_flop(Regression(), (x, y)) == 3 * max(2 * 5 * 3, 2 * 5 * 4)  # its 4 parameters count for more
    net = nn.Sequential(nn.Unflatten(1, (3, 1, 1)), nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8, 1))
    assert step_flop(Regression(net=net), (x, y)) == 3 * max(2 * 5 * (8 * 3 * 9 + 8), 2 * 5 * (8 * 27 + 8 + 9))


def test_trying_a_step_leaves_the_module_as_it_was():
    module = Regression(net=nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 1)))
    before, state = {k: v.clone() for k, v in module.state_dict().items()}, torch.get_rng_state()
    step_flop(module, (seeded(5, 3), seeded(5)))
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert module.training
    assert all(p.grad is None for p in module.parameters())


SEEN: list[int] = []


class Threads(Regression):
    """Notes the threads that it trains with."""

    def training_step(self, batch, batch_idx):
        SEEN.append(torch.get_num_threads())
        return super().training_step(batch, batch_idx)


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(_processes, "available_cores", lambda: 2)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield monkeypatch
    torch.set_num_threads(before)


def test_small_steps_run_on_one_thread(tmp_path, two_cores):
    module = Threads()
    quiet_trainer(tmp_path).fit(module, Clients())
    assert SEEN[-1] == 1
    assert torch.get_num_threads() == 2


def test_large_steps_run_on_all_threads(tmp_path, two_cores):
    two_cores.setattr(_processes, "LARGE_STEP", 0)
    module = Threads()
    quiet_trainer(tmp_path).fit(module, Clients())
    assert SEEN[-1] == 2


@pytest.mark.parametrize("engine", ["vmap", Vmap()])
def test_clients_side_by_side_are_one_large_step(tmp_path, two_cores, engine):
    """Steps of one client that are too small for two threads may be large together."""
    step = step_flop(Regression(), next(iter(Clients().train_dataloader())))
    two_cores.setattr(_processes, "LARGE_BATCHED_STEP", 2 * step)
    seen = []

    class Notes(Regression):
        def on_train_start(self):
            seen.append(torch.get_num_threads())

    for clients in (1, 2):
        quiet_trainer(tmp_path, engine=engine, clients_per_round=clients).fit(Notes(), Clients())
    assert seen == [1, 2]


def test_threads_that_the_user_chose_stay(tmp_path, two_cores):
    two_cores.setenv("OMP_NUM_THREADS", "2")
    module = Threads()
    quiet_trainer(tmp_path).fit(module, Clients())
    assert SEEN[-1] == 2


def test_threads_are_given_back_after_a_failure(tmp_path, two_cores):
    class Fails(Threads):
        def on_train_start(self):
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        quiet_trainer(tmp_path).fit(Fails(), Clients())
    assert torch.get_num_threads() == 2


def test_a_python_program_stays_one_process(tmp_path, two_cores):
    """It would run again from its start in every further process."""
    two_cores.setattr(_processes, "_WORTH_S", 0)
    trainer = quiet_trainer(tmp_path, devices="auto")
    trainer.fit(Regression(), Clients())
    assert trainer.world_size == 1


COMMAND = [
    *("fit", "-c", "configs/quickstart.yaml", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
    *("--trainer.max_rounds", "2", "--trainer.views", "[server]"),
]


def run(folder, code, **environment):
    """``fedlight fit`` in a process of its own, on what it takes for two cores; its rows and what it printed."""
    environment = {**{k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}, **environment}
    command = [sys.executable, str(code), *COMMAND, "--trainer.default_root_dir", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    rows = read_metrics(folder / "quickstart" / "version_0" / "metrics.csv")
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows], done.stderr


@RunIf(linux=True)
@pytest.mark.slow
def test_the_command_starts_a_process_per_core(tmp_path):
    """The same bits as in one process, as all of them have one thread."""
    code = tmp_path / "fedlight"  # the name by which a command is known
    code.write_text(
        "import fedlight.run.processes as p, os\n"
        "p._WORTH_S, p.available_cores = float(os.environ['WORTH']), lambda: 2\n"
        "from fedlight.cli.command import main\n"
        "main()\n"
    )
    one, quiet = run(tmp_path / "one", code, WORTH="1e9", OMP_NUM_THREADS="1")
    two, loud = run(tmp_path / "two", code, WORTH="0")
    assert "MEMBER: 2/2" in loud
    assert "MEMBER" not in quiet
    assert two == one


@pytest.mark.slow
@pytest.mark.parametrize("how", ["-c", "-"])
def test_a_program_without_a_file_is_told_that_it_cannot_be_started_again(how):
    code = (
        "from fedlight.run.setup import make_fabric\n"
        "make_fabric(dict(accelerator='cpu', devices=2, num_nodes=1, strategy='auto', precision='32-true'))"
    )
    words = [sys.executable, "-c", code] if how == "-c" else [sys.executable, "-"]
    ended = subprocess.run(words, input=code, capture_output=True, text=True)
    assert "trainer.devices=2" in ended.stderr
    assert "python -c, standard input and notebooks have no file" in ended.stderr
