"""Federated averaging of three hospitals by Flower, beside the plain loop of hospitals.py.

    python -m venv flower && flower/bin/pip install torch "flwr[simulation]" -e .
    flower/bin/python benchmarks/flower_fedavg.py [--rounds 1 5 20] [--seeds 3] [--check]

Flower pins its dependencies hard, so it has an environment of its own. Its simulation runs each
site as a client in a process of its own, and its strategy FedAvg (McMahan et al., AISTATS 2017)
averages what they send; what a site does in a round is what hospitals.py does there. Rows go to
results/hospitals.jsonl as "flower N", with the bytes of the arrays that Flower's messages carried.
`--check` also says how far the weights are from those of the plain loop: after one round they are
the same to the last bit; later Flower adds replies as they arrive, and training spreads what that
rounds otherwise.
"""

import argparse
import json
import os

import hospitals
import jsonl
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, Result
from flwr.simulation import run_simulation

from medistill import __version__
from medistill.backbones import Network
from medistill.rng import Rng

NAMES = list(hospitals.SITES)
State = dict[str, torch.Tensor]


def client(source: str, seed: int) -> ClientApp:
    """Return what runs at each site: train on its own images from the weights that it is sent."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        name = NAMES[int(context.node_config["partition-id"])]
        part = hospitals.site_splits(source, name).train
        network = fresh(part, seed)
        network.load_state_dict(message.content["arrays"].to_torch_state_dict(), strict=False)
        number = int(message.content["config"]["server-round"]) - 1
        hospitals.one_pass(part, seed * 1000 + number, network)
        sent = {
            "arrays": ArrayRecord(dict(network.parameter_state())),
            "metrics": MetricRecord({"num-examples": len(part)}),
        }
        return Message(content=RecordDict(sent), reply_to=message)

    return app


def fresh(part: hospitals.RealSet, seed: int) -> Network:
    """Return the network that all sites begin with."""
    return hospitals.STUDENT.build(part.card, Rng(seed).child("fedavg").at("network"))


class Counted(FedAvg):
    """FedAvg that adds up the bytes of the arrays that travel, both ways."""

    moved = 0

    def configure_train(self, *args: object, **named: object) -> list[Message]:  # type: ignore[override]
        """Count what is sent."""
        messages = list(super().configure_train(*args, **named))  # type: ignore[arg-type]
        self.moved += sum(map(size, messages))
        return messages

    def aggregate_train(self, server_round: int, replies: object) -> object:  # type: ignore[override]
        """Count what comes back."""
        held = list(replies)  # type: ignore[call-overload]
        self.moved += sum(map(size, held))
        return super().aggregate_train(server_round, held)


def size(message: Message) -> int:
    """Return the bytes of a message's arrays."""
    return sum(
        len(array.data) for r in message.content.array_records.values() for array in r.values()
    )


def flower(source: str, rounds: int, seed: int) -> tuple[State, int]:
    """Return the weights after so many rounds, and the bytes that moved."""
    part = hospitals.site_splits(source, NAMES[0]).train
    start = ArrayRecord(dict(fresh(part, seed).parameter_state()))
    strategy = Counted(
        fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=3, min_available_nodes=3
    )
    server, held = ServerApp(), list[Result]()

    @server.main()
    def main(grid: Grid, _: Context) -> None:
        held.append(strategy.start(grid=grid, initial_arrays=start, num_rounds=rounds))

    run_simulation(
        server_app=server,
        client_app=client(source, seed),
        num_supernodes=len(NAMES),
        backend_config={"client_resources": {"num_cpus": 1}},
    )
    return held[0].arrays.to_torch_state_dict(), strategy.moved


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", default="pneumoniamnist")
    parser.add_argument("--rounds", type=int, nargs="+", default=hospitals.ROUNDS)
    parser.add_argument("--seeds", type=int, default=hospitals.SEEDS)
    parser.add_argument("--check", action="store_true", help="Compare with the plain loop.")
    given = parser.parse_args()
    os.environ["FLWR_TELEMETRY_ENABLED"] = os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    torch.set_num_threads(1)
    splits = {name: hospitals.site_splits(given.source, name) for name in NAMES}
    tests = {name: one.test for name, one in splits.items()}
    done = {(row["source"], row["way"], row["seed"]) for row in jsonl.read(hospitals.RESULTS)}
    for seed in range(given.seeds):
        for rounds in given.rounds:
            if (given.source, f"flower {rounds}", seed) in done:
                continue
            state, moved = flower(given.source, rounds, seed)
            network = fresh(splits[NAMES[0]].train, seed)
            network.load_state_dict(state, strict=False)
            told = {"source": given.source, "way": f"flower {rounds}", "seed": seed}
            row = {**told, "bytes": moved, "rounds": rounds, **hospitals.scores(network, tests)}
            if given.check:
                plain = hospitals.fedavg([one.train for one in splits.values()], rounds, seed)
                row["apart"] = max(
                    float((state[name] - value).abs().max() / value.abs().max())
                    for name, value in plain.parameter_state().items()
                )
            jsonl.append(hospitals.RESULTS, [{**row, "version": __version__}])
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
