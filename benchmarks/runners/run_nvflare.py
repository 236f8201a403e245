"""NVFlare's simulator with its Lightning client, a process to a site.

This file is three things: the program that peers.py starts, which writes the job and runs the simulator; the module of
the server's component, which evaluates the model that a round has stored; and the script that every site runs within
its process. The variable PEERS_SITE tells the first from the last.

The simulator keeps a site's process from round to round only where there are as many threads as sites; with fewer, each
task begins with the imports of a new process, of torch and Lightning among them. A process has half a gigabyte of its
own, so there are as many sites as clients in a round, not one for each client: where a round takes 20 of 50 clients,
each of 20 sites has two or three of them and trains one, drawn anew every round. Both waits that a job can set are a
tenth of a second here, instead of two seconds (before a site asks again) and a half (before the server looks for
answers); a site's own, half a second each, for tasks and for what its script sends, are no setting.
"""
# ruff: noqa: D101, D102

import json
import logging
import os
import random
import tempfile
import time
from pathlib import Path

import problem as problems
import torch
from nvflare.apis.fl_component import FLComponent
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.workflows.fedavg import FedAvg
from nvflare.app_opt.pt.job_config.model import PTModel
from nvflare.job_config.api import FedJob
from nvflare.job_config.script_runner import ScriptRunner
from pytorch_lightning import LightningModule, Trainer
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

WAIT = 0.1  # seconds


class Model(LightningModule):
    def __init__(self, workload: str) -> None:
        super().__init__()
        self.workload = workload  # the job's file keeps arguments by the names of attributes
        problem = getattr(problems, workload)(0)
        self.net, self.lr = problem.net(), problem.lr

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Watch(FLComponent):
    def __init__(self, workload: str, file: str) -> None:
        super().__init__()
        self.workload, self.file = workload, file
        self.model, self.problem, self.ends = None, None, []

    def handle_event(self, event_type, fl_ctx):
        if event_type != AppEventType.AFTER_LEARNABLE_PERSIST:
            return
        if self.model is None:
            self.model, self.problem = Model(self.workload), getattr(problems, self.workload)(0)
        weights = fl_ctx.get_prop(AppConstants.GLOBAL_MODEL)["weights"]
        self.model.load_state_dict({name: torch.as_tensor(value) for name, value in weights.items()})
        accuracy = self.problem.accuracy(self.model.net)
        self.ends.append(time.perf_counter())
        Path(self.file).write_text(json.dumps({"ends": self.ends, "accuracy": accuracy}))


def site() -> None:
    """Train whenever the server asks, until it is done."""
    import nvflare.client.lightning as flare

    problem, _ = problems.from_arguments()
    torch.set_num_threads(1)
    for name in ["pytorch_lightning", "lightning.fabric", "lightning_fabric"]:
        logging.getLogger(f"{name}.utilities.rank_zero").setLevel(logging.ERROR)
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    trainer, model = Trainer(max_epochs=problem.epochs, accelerator="cpu", devices=1, **quiet), Model(problem.name)
    flare.patch(trainer)
    number = int(flare.get_site_name().removeprefix("site-")) - 1
    torch.manual_seed(number)  # the initial weights have left the same seed with every site
    own = problem.clients[number :: problem.per_round]
    while flare.is_running():
        trainer.fit(model, DataLoader(TensorDataset(*random.choice(own)), problem.batch_size, shuffle=True))


def main() -> None:
    """Run the simulator."""
    problem, arguments = problems.from_arguments()
    clock, sites = problems.Clock(), problem.per_round
    os.environ["PEERS_SITE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rounds.json")
        job = FedJob("peers", min_clients=sites)
        persistor = job.to_server(PTModel(Model(problem.name)))["persistor_id"]
        rounds = {"num_clients": sites, "num_rounds": problem.rounds}
        job.to_server(FedAvg(persistor_id=persistor, task_check_period=WAIT, **rounds))
        job.to_server({"server": {"task_request_interval": WAIT}})
        job.to_server(Watch(problem.name, str(file)))
        words = f"--workload {problem.name} --rounds {problem.rounds} --threads {arguments.threads}"
        job.to_clients(ScriptRunner(__file__, script_args=words))
        status = job.simulator_run(f"{folder}/work", n_clients=sites, threads=sites, log_config="ERROR")
        result = json.loads(file.read_text()) if file.exists() else {"ends": []}
    if status or len(result["ends"]) < problem.rounds:
        raise RuntimeError(f"the simulator ended with {status} after {len(result['ends'])} rounds")
    clock.ends = result["ends"]
    clock.report(result["accuracy"])


if __name__ == "__main__":
    site() if "PEERS_SITE" in os.environ else main()
