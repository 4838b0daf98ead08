"""Faults that hypothesis puts into a simulated pipeline, whatever the pipeline has to do."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from runtime.node import events as n


class FaultRules(RuleBasedStateMachine):
    """Rules of faults; the machine that inherits them makes ``self.pipeline``, a simulated pipeline."""

    def proceed(self, data, count):
        """Deliver messages and run work, in any order."""
        for _ in range(count):
            keys, busy = self.pipeline.waiting(), self.pipeline.busy()
            if not keys and not busy:
                return
            at = data.draw(st.integers(0, len(keys) + len(busy) - 1))
            if at < len(keys):
                self.pipeline.deliver(keys[at])
            else:
                self.pipeline.work(busy[at - len(keys)])

    def pick(self, data, **wanted):
        there = [p.number for p in self.pipeline.nodes.values() if all(getattr(p, k) == v for k, v in wanted.items())]
        return data.draw(st.sampled_from(there)) if there else None

    @rule(data=st.data())
    def kill(self, data):
        number = self.pick(data, alive=True)
        if number is not None:
            self.pipeline.kill(number)

    @precondition(lambda self: self.pipeline.exits)
    @rule()
    def notice_an_exit(self):
        self.pipeline.notice(self.pipeline.exits[0])

    @rule(data=st.data())
    def stop(self, data):
        number = self.pick(data, alive=True, stopped=False)
        if number is not None:
            self.pipeline.stop(number)

    @rule(data=st.data())
    def wake(self, data):
        number = self.pick(data, alive=True, stopped=True)
        if number is not None:
            self.pipeline.wake(number)

    @rule(data=st.data())
    def take_for_dead(self, data):
        number = self.pick(data, alive=True)
        if number is not None:
            self.pipeline.notice(number)

    @rule(data=st.data())
    def deliver_twice(self, data):
        keys = [key for key in self.pipeline.waiting() if key[2] == "data"]
        if keys:
            queue = self.pipeline.links[data.draw(st.sampled_from(keys))]
            queue.append(queue[0])

    @rule(data=st.data())
    def lose_a_message(self, data):
        keys = [key for key in self.pipeline.waiting() if key[2] == "data"]
        if keys:
            self.pipeline.lose(data.draw(st.sampled_from(keys)))

    @rule(data=st.data())
    def part(self, data):
        numbers = [0, *self.pipeline.nodes]
        if len(numbers) > 1:
            sender, to = (data.draw(st.sampled_from(numbers)) for _ in range(2))
            self.pipeline.part(sender, to)

    @precondition(lambda self: self.pipeline.parted)
    @rule(data=st.data())
    def mend(self, data):
        self.pipeline.mend(*data.draw(st.sampled_from(sorted(self.pipeline.parted))))

    @rule()
    def notice_links(self):
        self.pipeline.notice_links()

    @rule(seconds=st.integers(1, 200))
    def wait(self, seconds):
        self.pipeline.pass_time(seconds)

    @rule(data=st.data())
    def leave(self, data):
        number = self.pick(data, alive=True, stopped=False)
        if number is not None:
            self.pipeline.nodes[number].events.append(n.LeaveAsked("SIGTERM"))
