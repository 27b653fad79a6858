"""`greatctl train --sweep KEY=A,B`: many SAEs in one walk over the activations.

    greatctl train --sweep arch=topk,batchtopk --sweep k=16,32,64 --sweep lr=1e-4,3e-4

Every combination of the values is trained. The rows are read, shuffled and scaled once a step, and each SAE learns
from the same batches with a learning rate, a schedule, dead latents and random numbers of its own. Several hook points
are walked through together, one shuffle for all. A swept seed sets the initialisation and what an architecture draws;
the shuffle stays that of `--seed`, so that one walk serves all.

Each SAE is an artifact results/saes/<name> like any other, with the very bytes (on a CPU) of the single command

    greatctl train --arch topk --k 16 --lr 1e-4 --name NAME          (and --seed 1 --shuffle-seed 0)

so finished ones are skipped, and each can be gone on with alone. They are sealed last combination first: afterwards
the first-named combination is the newest SAE, which later stages use unless another is named. A run that was killed
goes on at the newest step that all of its SAEs have. An SAE that diverges is left out and named; the others go on.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import StageError
from ..events import Event, Run
from ..store.artifact import Work, current, touch, work
from ..store.files import write_json
from .context import Context, Plan, Result
from .train_jobs import STAGE, Maker, lasting, refuse_another, request_of, training_device
from .train_members import Member, members_of

if TYPE_CHECKING:
    from ..sae.produce import HeldOut
    from ..sae.rows import Rows
    from ..sae.trainer import Trainer
    from .train import Config

__all__ = ["plan_sweep", "run_sweep"]

_DIVERGED = "diverged.json"


def plan_sweep(ctx: Context, config: Config) -> Plan:
    """What would be trained.

    Raises: as `train_members.members_of`.
    """
    members = members_of(ctx, config)
    facts = [member.job.plan.facts for member in members]
    shown = ("arch", "d_in", "d_sae", "hook_point")
    rows = [
        {"name": m.final.name, **{key: found[key] for key in shown}, "k": m.k, "seed": m.config.seed}
        for m, found in zip(members, facts, strict=True)
    ]
    total = sum(int(found["training_bytes"]) for found in facts)  # type: ignore[call-overload]
    common = {key: value for key, value in facts[0].items() if all(found[key] == value for found in facts)}
    return Plan(STAGE, None, None, {**common, "saes": len(rows), "training_bytes": total, "sweep": rows})


def run_sweep(ctx: Context, config: Config) -> Result:
    """Train what is missing, or say that nothing changed.

    Returns:
        The summary of the first-named SAE that there is, with all of them under `sweep`; exit code 11 where one
        diverged.

    Raises:
        StageError: every SAE diverged.
    """
    members = members_of(ctx, config)
    todo = [member for member in members if not _is_current(member)]
    if config.controls:
        ctx.run.notice("train: a sweep trains no companions; `greatctl train --name NAME --controls …` does, for one")
    for member in todo:
        if not ctx.force:
            refuse_another(member.ctx, member.final, member.identity, resume=config.resume)
    if todo:
        ctx.run.notice(f"train: {len(todo)} of {len(members)} SAEs to train")
        training_device(ctx)
        waited = _train(ctx, config, todo)
    else:
        ctx.run.notice("train: up to date")
        waited = None
    made = [member for member in members if member.artifact is not None]
    failed = [member for member in members if member.error is not None]
    if not made:
        assert failed[0].error is not None
        raise failed[0].error
    for member in reversed(made):
        assert member.artifact is not None
        touch(member.artifact)
    first = made[0].artifact
    assert first is not None
    summary = {**first.summary, "waited_for_rows": waited, "sweep": [_row(member) for member in members]}
    return Result(STAGE, first.path, summary, up_to_date=not todo, exit_code=11 if failed else 0)


def _is_current(member: Member) -> bool:
    artifact, _ = current(member.final, member.identity)
    if artifact is None or member.ctx.force:
        return False
    member.artifact, member.summary, member.state = artifact, artifact.summary, "up to date"
    return True


def _train(ctx: Context, config: Config, members: Sequence[Member]) -> float | None:
    """Train, measure and seal; returns the share of the time in which rows were waited for."""
    from ..sae.produce import CHECKPOINTS

    started = time.monotonic()
    with ExitStack() as stack:
        if config.tensorboard:
            for member in members:
                member.ctx = dataclasses.replace(member.ctx, run=_curve_of(member, stack))
        voice = _Voice(ctx.run)
        places: dict[int, Work] = {}
        for member in members:
            origins = lasting(member.ctx.origins)
            place = stack.enter_context(work(member.final, member.identity, origins=origins, fresh=ctx.force))
            places[id(member)] = place
            write_json(place.path / CHECKPOINTS / "identity.json", member.identity.record())
            member.error = _diverged_before(place.path / CHECKPOINTS / _DIVERGED)
            member.state = "diverged" if member.error else member.state
        waited = seconds = 0.0
        for group in _passes([m for m in members if m.error is None], places):
            found = _Pass(group, places, voice, started).go()
            waited, seconds = waited + found[0], seconds + found[1]
    return round(waited / seconds, 4) if seconds else None


def _passes(members: Sequence[Member], places: Mapping[int, Work]) -> list[Sequence[Member]]:
    """Which SAEs are trained together: those that were begun and those that were not, unless little would be lost by
    beginning anew.
    """
    from ..sae.checkpoints import Checkpoints
    from ..sae.produce import CHECKPOINTS

    kept = {id(m): Checkpoints(places[id(m)].path / CHECKPOINTS).steps() for m in members}
    begun, fresh = [m for m in members if kept[id(m)]], [m for m in members if not kept[id(m)]]
    far = max((len(steps) for steps in kept.values()), default=0) > 1
    groups = [begun, fresh] if begun and fresh and far else [list(members)]
    return [group for group in groups if group]


class _Pass:
    """One walk with some of the SAEs, from their last common step to their sealed folders."""

    def __init__(self, members: Sequence[Member], places: Mapping[int, Work], voice: _Voice, started: float) -> None:
        self.members, self.places, self.voice, self.started = members, places, voice, started
        self.makers: dict[str, Maker] = {}
        self.rows: dict[str, Rows] = {}
        self.held: dict[str, HeldOut] = {}
        self.measuring: dict[str, dict[str, Any]] = {}

    def go(self) -> tuple[float, float]:
        """Train and seal; returns the seconds in which rows were waited for, and those of the walk."""
        from ..sae.walk import walk

        self._open()
        trainers = self._begin()
        walked = walk(trainers, lambda number, error: self._failed(self.members[number], error))
        self.voice(f"train: waited for rows: {walked.waited / walked.seconds:.1%}")
        for rows in self.rows.values():
            rows.release()
        for number in reversed(range(len(trainers))):
            trainer = trainers.pop()  # so that its memory is given back as soon as it is sealed
            if number not in walked.failures:
                self._seal(self.members[number], trainer, walked.steps[number])
        return walked.waited, walked.seconds

    def _open(self) -> None:
        """Rows and measurements, once for all that read the same."""
        from .sae_rows import open_rows

        for member in self.members:
            if (key := member.site) not in self.makers:
                self.makers[key] = Maker(
                    dataclasses.replace(member.ctx, run=self.voice.once()), member.config, member.job
                )
        first = next(iter(self.makers.values()))
        inputs = [maker.job.inputs for maker in self.makers.values()]
        opened = open_rows(first.ctx, inputs, first.store, first.aside, buffer_rows=first.config.buffer_rows)
        self.rows = dict(zip(self.makers, opened, strict=True))

    def _begin(self) -> list[Trainer]:
        """Trainers at their newest common step."""
        from ..sae.checkpoints import Checkpoints
        from ..sae.produce import CHECKPOINTS, begin, settings_for

        kept: list[tuple[Checkpoints, set[int]]] = []
        for member in self.members:
            last = settings_for(request_of(member.config, member.job), self.rows[member.site]).steps
            checkpoints = Checkpoints(self._folder(member) / CHECKPOINTS)
            if last not in (steps := checkpoints.steps()):  # the others are trained already
                kept.append((checkpoints, steps))
        common = max(set.intersection(*(steps for _, steps in kept)), default=0) if kept else 0
        for checkpoints, _ in kept:
            checkpoints.rewind(common)
        trainers = []
        for member in self.members:
            site, request = member.site, request_of(member.config, member.job)
            run = self.voice.of(member, site.split()[0] if len(self.rows) > 1 else "")
            trainers.append(begin(self._folder(member), self.rows[site], request, run, self.makers[site].device))
        return trainers

    def _seal(self, member: Member, trainer: Trainer, seconds: float) -> None:
        from ..sae.produce import CHECKPOINTS, HeldOut, finish

        site = member.site
        if site not in self.held:
            self.held[site] = HeldOut.of(self.rows[site])
            self.measuring[site] = self.makers[site].measuring()
        trainer.run = self.voice.of(member, member.final.name)
        try:
            summary = finish(self._folder(member), trainer, self.held[site], **self.measuring[site])
        except StageError as error:
            if error.name != "diverged":
                raise
            self._failed(member, error)
            return
        done = trainer.tokens - trainer.resumed_tokens
        rate = round(done / seconds, 1) if done and seconds else None
        place, spent = self.places[id(member)], round(time.monotonic() - self.started, 3)
        facts = {"name": member.job.name, **summary, "tokens_per_second": rate}
        member.artifact = place.seal(facts, discard=(CHECKPOINTS,), seconds=spent)
        member.summary = member.artifact.summary

    def _failed(self, member: Member, error: StageError) -> None:
        """Note it on the disk, so that a later run holds no other back for it."""
        from ..sae.produce import CHECKPOINTS

        member.error, member.state = error, "diverged"
        note = {"message": error.message, "why": error.why, "fix": error.fix}
        write_json(self._folder(member) / CHECKPOINTS / _DIVERGED, note)
        self.voice(f"{member.final.name}: {error.message}; the others went on")

    def _folder(self, member: Member) -> Path:
        return self.places[id(member)].path


class _Voice:
    """What many SAEs say, told once: what is true of all of them without a name, and what is not with one."""

    def __init__(self, run: Run) -> None:
        self.run, self._said = run, set[str]()

    def __call__(self, words: str) -> None:
        self.run.notice(words)

    def once(self) -> Run:
        """A run that says each sentence once."""
        return self._run(self.run, "", "")

    def of(self, member: Member, whose: str) -> Run:
        """A member's run; its curve's points carry its name, and what it says the name `whose`, if that is any."""
        return self._run(member.ctx.run, member.final.name, whose)

    def _run(self, run: Run, name: str, whose: str) -> Run:
        def emit(event: Event) -> None:
            words = event.message
            if event.kind == "notice":
                words = f"{whose}: {words}" if whose else words
                if words in self._said:
                    return
                self._said.add(words)
            elif event.kind == "metric":
                words = name
            run.emit(dataclasses.replace(event, message=words))

        return Run(run.stage, emit, run.stop)


def _curve_of(member: Member, stack: ExitStack) -> Run:
    from .curves import tensorboard

    logs = member.ctx.project.results / "logs" / "tensorboard" / member.job.name
    return stack.enter_context(tensorboard(member.ctx.run, logs))


def _diverged_before(path: Path) -> StageError | None:
    """How an SAE diverged in an earlier run of this sweep; it would again."""
    try:
        noted = json.loads(path.read_bytes())
        return StageError(noted["message"], why=noted["why"], fix=noted["fix"], code="diverged")
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _row(member: Member) -> dict[str, object]:
    """The SAE's line in the table."""
    keys = ("l0", "explained_variance", "ce_loss_recovered", "dead_fraction", "tokens_per_second")
    lr = member.config.lr
    if member.artifact is not None:
        made = json.loads((member.artifact.path / "training.json").read_bytes())
        lr = made["settings"]["lr"]
    return {
        "name": member.final.name,
        "state": member.state,
        "arch": member.config.arch,
        "d_sae": member.job.options["d_sae"],
        "k": member.k,
        "lr": lr,
        "seed": member.config.seed,
        "hook_point": member.job.inputs.meta["hook_point"],
        **{key: member.summary.get(key) for key in keys},
        **({"why": member.error.message} if member.error else {}),
    }
