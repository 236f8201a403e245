from module import Net

from fedlight import MAN, FederatedTrainer, ImageData


def test_a_few_rounds_are_better_than_chance(tmp_path):
    trainer = FederatedTrainer(
        max_rounds=5, clients_per_round=0.5, callbacks=[MAN(zeta=0.1)], accelerator="cpu", default_root_dir=tmp_path
    )
    trainer.fit(Net(), ImageData("digits", num_clients=10, batch_size=16))
    assert trainer.callback_metrics["val/accuracy"] > 0.5
