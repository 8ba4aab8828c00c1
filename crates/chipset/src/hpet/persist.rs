//! What is saved of the HPET. It re-raises the lines of level-triggered timers whose status bit is set; it is
//! restored before PIT and RTC, whose interrupts it may have taken over.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use wardian_irq::{Due, IrqChip, TickLink};
use wardian_state::check::{Wrong, at_most, ensure, only_bits};
use wardian_state::{Record, Refused};
use wardian_time::{RunState, Tick, TickConfig, TickState, TimeBase, TimerQueue, not_before_saved};

use super::regs::{
    Comparator, ENABLE, HZ, LEGACY, Regs, T_LEVEL, T_PERIODIC, T_ROUTE, T_ROUTE_SHIFT, T_SET_VALUE,
    T_WRITABLE, TIMERS, routes,
};
use super::{Hpet, LegacyRouting, PERIOD_NS};
use crate::edge_ticks::{EdgeTicks, check_link};
use crate::wire::lock;

/// One timer as it is saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HpetTimerState {
    /// Configuration register without the capability bits.
    pub config: u64,
    /// Comparator in the 64 bits of the counter, also in 32-bit mode.
    pub comparator: u64,
    /// Period in ticks as the guest set it; 0 if it did not.
    pub period: u64,
    /// The comparator was set and has not matched yet.
    pub armed: bool,
    /// Its matches.
    pub tick: TickState,
    /// How far such a match is on its way.
    pub link: TickLink,
}

/// The HPET as it is saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HpetState {
    /// When it was saved, on the time line.
    pub saved_at_ns: u64,
    /// General configuration register.
    pub config: u64,
    /// General interrupt status register.
    pub status: u64,
    /// The counter,
    pub counter: u64,
    /// at this guest time.
    pub counter_at_ns: u64,
    /// The timers.
    pub timers: [HpetTimerState; TIMERS],
}

impl Record for HpetState {
    const KIND: &'static str = "hpet";
    const VERSION: u16 = 1;
}

impl Hpet {
    /// What to save: counter and comparators as they are at this moment.
    #[must_use]
    pub fn save(&self) -> HpetState {
        let mut state = self.change(|regs, now, line| HpetState {
            saved_at_ns: line.0,
            config: regs.config,
            status: regs.status,
            counter: regs.counter(now),
            counter_at_ns: now.0,
            timers: regs.timers.map(|timer| HpetTimerState {
                config: timer.config,
                comparator: timer.at,
                period: timer.period,
                armed: timer.armed,
                tick: timer.tick.save(),
                link: TickLink::default(),
            }),
        });
        for (timer, tick) in state.timers.iter_mut().zip(self.ticks.get().into_iter().flatten()) {
            timer.link = tick.port().link();
        }
        state
    }

    /// The HPET that was saved as `state`, to be built as [`Hpet::new`] says once `queue`'s base stands where it did.
    ///
    /// # Errors
    /// When an HPET cannot be in that state.
    pub fn restore(
        queue: &Arc<TimerQueue>,
        chip: &Arc<dyn IrqChip>,
        routing: LegacyRouting,
        ticks: TickConfig,
        state: &HpetState,
    ) -> Result<Arc<Hpet>, Refused> {
        let regs = Regs::restore(queue.base(), ticks, state).map_err(Wrong::in_record::<HpetState>)?;
        let hpet = Self::build(queue, chip, routing, regs);
        let ports: Vec<_> = hpet.ticks.get().into_iter().flatten().cloned().collect();
        for ((index, tick), timer) in ports.iter().enumerate().zip(&state.timers) {
            tick.port().set_link(timer.link);
            if tick.port().tells_taken() {
                lock(&hpet.regs).timers[index].handed = timer.link.due != Due::No;
            } else if timer.config & T_LEVEL == 0 {
                tick.restore_link(timer.link);
            }
        }
        hpet.change(|_, _, _| ());
        Ok(hpet)
    }
}

impl Regs {
    fn restore(base: &TimeBase, ticks: TickConfig, state: &HpetState) -> Result<Regs, Wrong> {
        not_before_saved("saved_at_ns", state.saved_at_ns, base)?;
        only_bits("config", state.config, ENABLE | LEGACY)?;
        only_bits("status", state.status, (1u64 << TIMERS) - 1)?;
        at_most("counter_at_ns", state.counter_at_ns, base.now().0)?;
        let mut regs = Regs::new(ticks);
        regs.config = state.config;
        regs.status = state.status;
        let running = regs.running();
        regs.counter =
            if running { state.counter.wrapping_sub(state.counter_at_ns / PERIOD_NS) } else { state.counter };
        for (index, saved) in state.timers.iter().enumerate() {
            let level = saved.config & T_LEVEL != 0;
            ensure(level || state.status & 1 << index == 0, "status", || format!("timer {index} has edges"))?;
            regs.timers[index] =
                saved.restore(base, ticks, running).map_err(|e| e.within(format_args!("timers[{index}]")))?;
        }
        Ok(regs)
    }
}

impl HpetTimerState {
    fn restore(&self, base: &TimeBase, ticks: TickConfig, running: bool) -> Result<Comparator, Wrong> {
        only_bits("config", self.config, T_WRITABLE)?;
        let route = (self.config & T_ROUTE) >> T_ROUTE_SHIFT;
        ensure(routes() & 1 << route != 0, "config", || format!("no timer is routed to input {route}"))?;
        let set_value = self.config & (T_SET_VALUE | T_PERIODIC) == T_SET_VALUE;
        ensure(!set_value, "config", || "its comparator is not periodic")?;
        check_link(&self.link)?;
        let timer = Comparator {
            config: self.config,
            at: self.comparator,
            period: self.period,
            armed: self.armed,
            tick: Tick::restore(ticks, &self.tick, base.timeline()).map_err(|e| e.within("tick"))?,
            handed: false,
        };
        let every = self.tick.run.every(HZ).map_err(|e| e.within("tick"))?;
        let fits = match self.tick.run {
            RunState::Stopped => true,
            RunState::Once { .. } => running && timer.repeats().is_none(),
            RunState::Periodic { .. } => running && timer.repeats() == every,
        };
        ensure(fits, "tick.run", || "the timer is set otherwise")?;
        Ok(timer)
    }
}

#[cfg(test)]
mod tests {
    use super::{Hpet, HpetState};
    use crate::hpet::LegacyRouting;
    use crate::testing::twin::{self, Random, Twin};
    use crate::testing::{Clock, at};
    use crate::wire::tests::Recorder;
    use std::sync::Arc;
    use wardian_bus::Device;
    use wardian_irq::IrqChip;
    use wardian_state::Refused;
    use wardian_time::{Nanos, RunState, TickConfig, TickPolicy};

    struct HpetTwin {
        clock: Clock,
        chip: Arc<Recorder>,
        routing: LegacyRouting,
        ticks: TickConfig,
        hpet: Arc<Hpet>,
    }

    impl HpetTwin {
        fn put(&self, offset: u64, value: u64) {
            self.hpet.write(at(offset), &value.to_le_bytes());
        }
    }

    impl Twin for HpetTwin {
        type State = HpetState;

        fn fresh(random: &mut Random) -> HpetTwin {
            let (clock, chip, routing) = (Clock::new(), Recorder::new(), LegacyRouting::default());
            let policy = random.one_of(&[
                TickPolicy::LateOne,
                TickPolicy::Replay,
                TickPolicy::Sync,
                TickPolicy::Async,
            ]);
            let ticks = TickConfig { policy, align: random.once_in(2) };
            let hpet =
                Hpet::new(&clock.queue, &(Arc::clone(&chip) as Arc<dyn IrqChip>), routing.clone(), ticks);
            HpetTwin { clock, chip, routing, ticks, hpet }
        }

        fn restored(other: &HpetTwin, state: &HpetState) -> Result<HpetTwin, Refused> {
            let (clock, chip, routing) = (other.clock.twin(), Recorder::new(), LegacyRouting::default());
            let irqs = Arc::clone(&chip) as Arc<dyn IrqChip>;
            let hpet = Hpet::restore(&clock.queue, &irqs, routing.clone(), other.ticks, state)?;
            Ok(HpetTwin { clock, chip, routing, ticks: other.ticks, hpet })
        }

        fn save(&self) -> HpetState {
            let state = self.hpet.save();
            self.chip.news();
            state
        }

        fn clock(&self) -> &Clock {
            &self.clock
        }

        fn live(&self, random: &mut Random) -> String {
            let mut data = [0; 8];
            let index = random.below(3);
            let timer = 0x100 + 0x20 * index;
            let number =
                [random.below(100), random.below(200_000), 0xffff_f000 + random.below(8192), random.next()];
            match random.below(16) {
                0 | 1 => self.put(0x10, random.one_of(&[1, 1, 1, 1, 3, 0])),
                2..5 => {
                    // An input of its own: an edge of one would take a level of another down.
                    let route = random.one_of(&[20 + index, 20 + index, [23, 5, 5][index as usize]]) << 9;
                    self.put(timer, (random.next() & 0x14e | random.one_of(&[4, 4, 0])) | route);
                }
                5..9 => self.put(timer + 8, random.one_of(&number)),
                9 => self.hpet.write(at(timer + 8), &(random.next() as u32).to_le_bytes()),
                10 => self.put(0x20, random.below(8)),
                11 => self.put(0xf0, random.one_of(&number)),
                12 => self.hpet.read(at(0xf0), &mut data),
                13 => self.hpet.read(at(0x20), &mut data),
                _ => self.hpet.read(at(timer + 8 * random.below(2)), &mut data),
            }
            format!("{data:?} {:?} {}", self.chip.news(), self.routing.is_on())
        }

        fn raised(&self) -> Vec<u32> {
            self.chip.high()
        }
    }

    #[test]
    fn a_restored_hpet_lives_on() {
        twin::lives_on::<HpetTwin>(200);
        twin::is_not_upset::<HpetTwin>(60);
        twin::restores_golden::<HpetTwin>(|state| state.saved_at_ns);
    }

    #[test]
    fn impossible_states_are_refused_by_name() {
        let one = HpetTwin::fresh(&mut Random::new(1));
        one.put(0x10, 1);
        one.put(0x100, 0x4c | 20 << 9);
        one.put(0x108, 50_000);
        one.put(0x108, 50_000);
        one.clock.run(Nanos(5_000));
        let refusal = |change: fn(&mut HpetState)| twin::refusal(&one, change);
        assert_eq!(refusal(|_| ()), "taken");
        assert_eq!(refusal(|s| s.saved_at_ns = 5_001), "saved_at_ns");
        assert_eq!(refusal(|s| s.counter_at_ns = 5_001), "counter_at_ns");
        assert_eq!(refusal(|s| s.config = 4), "config");
        assert_eq!(refusal(|s| s.status = 8), "status");
        assert_eq!(refusal(|s| s.status = 1), "status");
        assert_eq!(refusal(|s| s.timers[1].config = 0x8000 | 20 << 9), "timers[1].config");
        assert_eq!(refusal(|s| s.timers[1].config = 5 << 9), "timers[1].config");
        assert_eq!(refusal(|s| s.timers[2].config = 0x40 | 20 << 9), "timers[2].config");
        assert_eq!(refusal(|s| s.config = 0), "timers[0].tick.run");
        assert_eq!(refusal(|s| s.timers[0].period = 60_000), "timers[0].tick.run");
        assert_eq!(refusal(|s| s.timers[0].tick.run = RunState::Once { at_ns: 7 }), "timers[0].tick.run");
        assert_eq!(refusal(|s| s.timers[1].tick.backlog = 1), "timers[1].tick.backlog");
    }
}
