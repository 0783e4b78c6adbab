"""A small real task: a random model learns to write token LIKED.  Also a program to be killed.

python tests/engine/toy_run.py reads lines "MODEL FOLDER KILL_AT": each is a process that trains in
FOLDER, resuming what is there, and kills itself with SIGKILL inside step KILL_AT (0: never), after
the sampling and before the update.
"""

import os
import signal
import sys
from dataclasses import dataclass

import torch

from tercet.engine.metrics import RunLog
from tercet.engine.model import Policy
from tercet.engine.records import Request, Rewards, Rollouts, SamplingParams
from tercet.engine.sampler import TransformersSampler
from tercet.engine.trainer import TrainConfig, Trainer

LIKED = 5


@dataclass
class LikesOneToken:
    """Reward: share of LIKED among the completion, plus a part that every group cancels."""

    num_groups: int = 4
    group_size: int = 4
    max_completion_length: int = 6
    temperature: float = 1.0
    pool: bool = False
    kill_at: int = 0

    def requests(self, step: int) -> list[Request]:
        self.step = step
        params = SamplingParams(
            max_completion_length=self.max_completion_length, temperature=self.temperature
        )
        return [
            Request(
                prompt_ids=[10 + (step * 7 + group * 3 + i) % 40 for i in range(3 + group)],
                params=params,
                group=group,
                pool_from=1 if self.pool else None,
            )
            for group in range(self.num_groups)
            for _ in range(self.group_size)
        ]

    def rewards(self, rollouts: Rollouts) -> Rewards:
        if self.kill_at and self.step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        rows = [rollouts.completions[i].ids for i in rollouts.rows("rollout")]
        groups = torch.tensor([rollouts.requests[i].group for i in rollouts.rows("rollout")])
        share = torch.tensor([ids.count(LIKED) / len(ids) for ids in rows])
        shared = 1.0 + groups.float()
        return Rewards(total=share + shared, parts={"share": share, "shared": shared})

    def evaluate(self, step: int) -> dict[str, float]:
        return {"step_seen": float(step)}

    def samples(self, rollouts: Rollouts, rewards: Rewards) -> list[dict]:
        return [{"completion": rollouts.completions[0].ids, "reward": float(rewards.total[0])}]


def make_trainer(
    policy: Policy, system: LikesOneToken, config: TrainConfig, folder, *, resume: bool = False
) -> Trainer:
    log = RunLog.create(folder, config, total_steps=config.max_steps, resume=resume)
    return Trainer(policy, TransformersSampler(policy), system, config, log)


def main(model: str, folder: str, kill_at: str) -> None:
    policy = Policy.from_pretrained(model)
    config = TrainConfig(
        max_steps=6, learning_rate=1e-2, save_steps=2, mini_batches=2, beta=0.01, eval_steps=3
    )
    system = LikesOneToken(num_groups=8, group_size=8, kill_at=int(kill_at))
    make_trainer(policy, system, config, folder, resume=True).train()


def serve() -> None:
    """One run per line of input, each in a process of its own; answers with its wait status."""
    torch.set_num_threads(1)
    answers = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what runs print is not an answer
    for line in sys.stdin:
        child = os.fork()  # before torch has started a thread: a run is a second, an import is six
        if child == 0:
            main(*line.split())
            sys.stdout.flush()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        os.write(answers, f"{status}\n".encode())


if __name__ == "__main__":
    serve()
