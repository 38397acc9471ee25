"""Moves of the coordinator, the workers and the graders, for the protocol state machine."""

from __future__ import annotations

from ringasync.broker.types import Verdict, VersionInfo
from ringasync.records.segment import decode_segment

from .kit import item
from .protocol_ground import ProtocolGround
from .protocol_model import Holding

MAX_ATTEMPTS = 3


class WorkMoves(ProtocolGround):
    """Each move asserts its own answer and keeps the model in step."""

    # Coordinator

    def feed(self, size: int, kind: str) -> None:
        group_id = self.next("e" if kind == "eval" else "g")
        self.do(self.kit.feed(group_id, size=size, kind=kind))
        self.note_group(group_id, size)

    def do_pin(self, on: bool) -> None:
        self.do(self.broker.set_pin(self.kit.coordinator, on))

    def publish(self) -> None:
        version = self.model.latest_version + 1
        self.do(self.broker.publish(self.kit.learner, VersionInfo(version, version, 0, "{}")))
        self.model.versions_seen.append(version)

    def sessions_die(self, dead: set[int]) -> None:
        model = self.model
        gone = {s for number, s in enumerate(model.sessions) if number in dead}
        holders = self.holders()
        self.do(self.kit.expire_sessions(*(s for s in model.sessions if s not in gone)))
        for session in gone:
            model.sessions.remove(session)
            model.void_session(holders, session)
        self.void_what_ended()

    def round_moves_on(self) -> None:
        records, kit = self.model.records, self.kit
        if self.mode != "rounds":
            return self.do_pin(False)
        if records.round_state == "none":
            self.purge(1, "replace" if records.round_id % 2 else "drop_group")
            records.round_id += 1
            self.do(self.broker.open_round(kit.coordinator, self.next("open"), records.round_id))
            records.round_state = "open"
        elif records.round_state == "open":
            request = self.next("close")
            for _ in range(2):
                self.do(self.broker.close_round(kit.coordinator, request, records.round_id))
            for rollout_id in records.retention:
                if self.do(kit.state(rollout_id)) in ("queued", "parked", "leased"):
                    records.retention[rollout_id] += 0 if rollout_id[0] == "e" else 1
            records.round_state = "closing"
        elif records.round_state == "closing":
            held = any(h.lease.kind == "train" for h in self.model.live())
            moved = self.do(self.broker.round_to_training(kit.coordinator, records.round_id))
            assert moved is not held
            records.round_state = "training" if moved else "closing"
        else:
            self.do(self.broker.finish_round(kit.learner, records.round_id))
            records.round_state = "none"

    def purge(self, sigma: int, action: str) -> None:
        request, records = self.next("purge"), self.model.records
        call = self.broker.purge
        purged = self.do(call(self.kit.coordinator, request, sigma, action))  # type: ignore[arg-type]
        assert self.do(call(self.kit.coordinator, request, sigma, "replace")) == purged
        for name in purged:
            if action == "drop_group":
                carried = [v for r, v in records.retention.items() if r.split(".")[0] == name]
                assert max(carried) > sigma
                self.model.void_group(name)
                continue
            assert records.retention[name] > sigma
            self.model.void(name)
            group = self.do(self.broker.group(name.split(".")[0]))
            assert group is not None
            for number in group["members"].split(","):
                fresh = f"{name.split('.')[0]}.{number}"
                records.lengths.setdefault(fresh, 0)
                records.retention.setdefault(fresh, 0)

    # Workers

    def session(self, who: int) -> str:
        """One of the living sessions; a worker joins if there is none."""
        if not self.model.sessions:
            self.worker_joins()
        return self.model.sessions[who % len(self.model.sessions)]

    def worker_joins(self) -> None:
        if len(self.model.sessions) < 3:
            self.model.sessions.append(self.do(self.kit.session(self.next("s"))))

    def take(self, who: int, n: int, behind: bool) -> None:
        model = self.model
        session = self.session(who)
        version = max(1, model.latest_version - int(behind))
        for lease in self.do(self.broker.take(session, n, version)):
            model.note_token(lease.rollout_id, lease.token)
            assert lease.num_tokens == model.records.lengths[lease.rollout_id]
            assert lease.retention == model.records.retention[lease.rollout_id]
            assert (
                lease.kind == "eval" or self.mode != "rounds" or model.records.round_state == "open"
            )
            assert lease.group_id not in model.journalled_groups
            newest = max((decode_segment(one).policy_version for one in lease.segments), default=0)
            assert newest <= version, "versions would fall inside a rollout"
            model.void(lease.rollout_id)
            model.holdings.append(Holding(lease, lease.num_tokens, version))
        model.forget_old_zombies()

    def append(self, which: int, length: int, newer: bool) -> None:
        holding = self.pick(which, void=False)
        if holding is None:
            return self.take(which, length, newer)
        holding.version = self.model.latest_version if newer else holding.version
        one = item(holding.lease, holding.length, length, holding.version)
        assert self.do(self.broker.append_many("w", [one, one])) == ["ok", "duplicate"]
        assert self.do(self.broker.append_many("w", [one])) == ["duplicate"]
        holding.length += length
        self.model.records.lengths[holding.lease.rollout_id] = holding.length

    def zombie_acts(self, which: int) -> None:
        """Somebody whose lease went acts on, preferably on a rollout that another holds now."""
        if not self.robbed():
            self.take(which, 2, False)
            self.park(which, "drain")
            self.take(which + 1, 4, False)
        zombies = self.robbed() or [holding for holding in self.model.holdings if holding.void]
        if not zombies:
            return
        zombie = zombies[which % len(zombies)]
        one = item(zombie.lease, zombie.length, 2, zombie.version)
        assert self.do(self.broker.append_many("w", [one]))[0] in ("fenced", "gone")
        refused = ("fenced", "gone", "duplicate")
        assert self.do(self.kit.finish(zombie.lease, zombie.length)) in refused
        assert self.do(self.kit.park(zombie.lease)) in refused

    def robbed(self) -> list[Holding]:
        held = {holding.lease.rollout_id for holding in self.model.live()}
        return [h for h in self.model.holdings if h.void and h.lease.rollout_id in held]

    def park(self, which: int, why: str) -> None:
        holding = self.pick(which, void=False)
        if holding is not None:
            assert self.do(self.kit.park(holding.lease, why)) == "ok"
            assert self.do(self.kit.park(holding.lease, why)) in ("duplicate", "gone")
            self.model.void(holding.lease.rollout_id)
            self.void_what_ended()

    def finish(self, which: int) -> None:
        holding = self.pick(which, void=False)
        if holding is not None:
            assert self.do(self.kit.finish(holding.lease, holding.length)) == "ok"
            assert self.do(self.kit.finish(holding.lease, holding.length)) == "duplicate"
            self.model.void(holding.lease.rollout_id)

    def quarantine(self, which: int) -> None:
        holding = self.pick(which, void=False)
        if holding is not None:
            row = (holding.lease.rollout_id, holding.lease.token, "broken record")
            assert self.do(self.broker.quarantine_many("w", [row])) == ["ok"]
            self.model.void_group(holding.lease.group_id)

    def worker_leaves(self, who: int) -> None:
        if not self.model.sessions:
            return
        holders = self.holders()
        session = self.model.sessions.pop(who % len(self.model.sessions))
        self.do(self.broker.close_session(session))
        self.model.void_session(holders, session)

    # Graders

    def take_grading(self, who: int, n: int) -> None:
        session = self.session(who)
        for job in self.do(self.broker.take_grading(session, n)):
            self.model.note_token(job.rollout_id, job.token)
            self.model.void(job.rollout_id)
            self.model.jobs.append((job, False))

    def grade(self, which: int, reward: float | None) -> None:
        if not self.model.jobs:
            return
        job, void = self.model.jobs.pop(which % len(self.model.jobs))
        verdict = Verdict(job.rollout_id, job.token, reward, "" if reward is not None else "boom")
        call = self.broker.grade_many
        statuses = self.do(call("w", [verdict], MAX_ATTEMPTS, True, 4))
        assert statuses[0] in (("fenced", "gone") if void else ("ok",))
        again = self.do(call("w", [verdict], MAX_ATTEMPTS, True, 4))
        assert again[0] in ("fenced", "gone", "duplicate")
        self.void_what_ended()

    def zombie_grades(self, who: int) -> None:
        """A grader whose session went answers on what another is grading now."""
        session = self.session(who)
        self.everything_is_finished(session)
        self.take_grading(who, 2)
        if len(self.model.sessions) < 2:
            self.worker_joins()
        self.worker_leaves(self.model.sessions.index(session))
        self.take_grading(who, 4)
        now = {job.rollout_id for job, void in self.model.jobs if not void}
        for job, void in self.model.jobs:
            if void and job.rollout_id in now:
                verdict = Verdict(job.rollout_id, job.token, 0.5, "")
                assert self.do(self.broker.grade_many("w", [verdict], MAX_ATTEMPTS, True, 4)) in (
                    ["fenced"],
                    ["gone"],
                    ["duplicate"],
                )

    def everything_is_finished(self, session: str) -> None:
        """A worker that ends what anybody generates, after it has taken some more."""
        self.take(self.model.sessions.index(session), 2, False)
        for holding in self.model.live():
            assert self.do(self.kit.finish(holding.lease, holding.length)) == "ok"
            self.model.void(holding.lease.rollout_id)

    def everything_is_finished_and_graded(self, who: int) -> None:
        """A worker that works: without it, few random moves would bring a group to the learner."""
        model, version = self.model, self.model.latest_version
        session = self.session(who)
        if who % 2:
            self.feed(2, "train")
        self.take(who, 4, False)
        for holding in model.live():
            if holding.lease.kind == "train":
                one = item(holding.lease, holding.length, 3, version)
                assert self.do(self.broker.append_many("w", [one])) == ["ok"]
                assert self.do(self.kit.finish(holding.lease, holding.length + 3)) == "ok"
                model.records.lengths[holding.lease.rollout_id] += 3
                model.void(holding.lease.rollout_id)
        jobs = self.do(self.broker.take_grading(session, 9))
        verdicts = [
            Verdict(job.rollout_id, job.token, float(job.rollout_id.endswith(".0"))) for job in jobs
        ]
        for job in jobs:
            model.note_token(job.rollout_id, job.token)
            model.void(job.rollout_id)
        statuses = self.do(self.broker.grade_many("w", verdicts, MAX_ATTEMPTS, True, 4))
        assert statuses == ["ok"] * len(jobs)
        self.void_what_ended()
