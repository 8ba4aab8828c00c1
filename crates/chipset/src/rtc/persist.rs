//! What is saved of the CMOS clock. It re-raises its line if an enabled interrupt waits, unless the HPET has taken
//! that over: the HPET is restored before it.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use wardian_irq::{Due, Line, TickLink};
use wardian_state::check::{Wrong, at_most, ensure, only_bits};
use wardian_state::{Record, Refused, hex};
use wardian_time::{RunState, Tick, TickConfig, TickState, TimeBase, TimerQueue, not_before_saved};

use super::{A, A_UIP, ALARM, B, B_SET, B_UIE, C, D, PERIODIC, QUARTZ, Rtc, SECOND, State, UPDATE};
use crate::edge_ticks::check_link;
use crate::hpet::LegacyRouting;
use crate::wire::{Wire, lock};

/// The clock of no machine is further off than this, in seconds: its registers end with the year 9999.
const MAX_OFFSET: u64 = 1_000_000_000_000;

/// The clock as it is saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RtcState {
    /// When it was saved, on the time line.
    pub saved_at_ns: u64,
    /// The register that the data port shows.
    pub index: u8,
    /// NMIs are masked by port 70h.
    pub nmi_masked: bool,
    /// The memory; its time registers count only while the clock is held.
    #[serde(with = "hex")]
    pub registers: [u8; 128],
    /// PF, AF and UF of register C.
    pub flags: u8,
    /// What the clock shows less the machine's wall clock: whole seconds,
    pub offset_s: i64,
    /// and the rest.
    pub offset_ns: u32,
    /// The divider was in reset while the clock was held.
    pub divider_was_reset: bool,
    /// Second, of what the clock shows, up to which updates and alarms are accounted for.
    pub seen_s: i64,
    /// The periodic interrupt.
    pub tick: TickState,
    /// How far that is on its way.
    pub link: TickLink,
}

impl Record for RtcState {
    const KIND: &'static str = "rtc";
    const VERSION: u16 = 1;
}

impl Rtc {
    /// What to save.
    #[must_use]
    pub fn save(&self) -> RtcState {
        let state = self.change(|state, _, _| state.clone());
        RtcState {
            saved_at_ns: self.base.timeline().0,
            index: state.index,
            nmi_masked: state.nmi_masked,
            registers: state.cmos,
            flags: state.flags,
            offset_s: state.offset.div_euclid(SECOND) as i64,
            offset_ns: state.offset.rem_euclid(SECOND) as u32,
            divider_was_reset: state.divider_was_reset,
            seen_s: state.seen as i64,
            tick: state.tick.save(),
            link: self.ticks.get().map(wardian_irq::TickPort::link).unwrap_or_default(),
        }
    }

    /// The clock that was saved as `state`, to be built as [`Rtc::new`] says once `queue`'s base stands where it did.
    ///
    /// # Errors
    /// When a clock cannot be in that state.
    pub fn restore(
        queue: &Arc<TimerQueue>,
        line: Line,
        routing: LegacyRouting,
        ticks: TickConfig,
        state: &RtcState,
    ) -> Result<Arc<Rtc>, Refused> {
        let registers = State::restore(queue.base(), ticks, state).map_err(Wrong::in_record::<RtcState>)?;
        let rtc = Rtc::build(queue, line, routing, registers);
        if let Some(port) = rtc.ticks.get() {
            port.set_link(state.link);
            lock(&rtc.state).handed = port.tells_taken() && state.link.due != Due::No;
        }
        rtc.change(|_, _, _| ());
        Ok(rtc)
    }
}

impl State {
    fn restore(base: &TimeBase, ticks: TickConfig, saved: &RtcState) -> Result<State, Wrong> {
        not_before_saved("saved_at_ns", saved.saved_at_ns, base)?;
        at_most("index", saved.index, 0x7fu8)?;
        only_bits("registers[0x0a]", saved.registers[A], !A_UIP)?;
        let updates = saved.registers[B] & (B_SET | B_UIE) == B_SET | B_UIE;
        ensure(!updates, "registers[0x0b]", || "a clock that is held has no update interrupts")?;
        only_bits("registers[0x0c]", saved.registers[C], 0u8)?;
        only_bits("registers[0x0d]", saved.registers[D], 0u8)?;
        only_bits("flags", saved.flags, PERIODIC | ALARM | UPDATE)?;
        at_most("offset_s", saved.offset_s.unsigned_abs(), MAX_OFFSET)?;
        at_most("offset_ns", saved.offset_ns, 999_999_999u32)?;
        check_link(&saved.link)?;
        let mut state = State {
            index: saved.index,
            nmi_masked: saved.nmi_masked,
            cmos: saved.registers,
            flags: saved.flags,
            offset: i128::from(saved.offset_s) * SECOND + i128::from(saved.offset_ns),
            divider_was_reset: saved.divider_was_reset,
            seen: i128::from(saved.seen_s),
            tick: Tick::new(ticks),
            handed: false,
            wire: Wire::default(),
        };
        let second = state.clock(base.wall()).div_euclid(SECOND);
        ensure(state.seen <= second, "seen_s", || format!("the clock shows second {second} only"))?;
        let every = saved.tick.run.every(QUARTZ).map_err(|e| e.within("tick"))?;
        let rate = state.rate();
        let once = matches!(saved.tick.run, RunState::Once { .. });
        ensure(every == rate && !once, "tick.run", || {
            format!("a period of {every:?}, where register A has {rate:?}")
        })?;
        state.tick = Tick::restore(ticks, &saved.tick, base.timeline()).map_err(|e| e.within("tick"))?;
        Ok(state)
    }
}

#[cfg(test)]
mod tests {
    use super::{Rtc, RtcState};
    use crate::hpet::LegacyRouting;
    use crate::layout::GSI_RTC;
    use crate::rtc::MemorySize;
    use crate::testing::twin::{self, Random, Twin};
    use crate::testing::{Clock, at};
    use crate::wire::tests::Recorder;
    use std::sync::Arc;
    use wardian_bus::Device;
    use wardian_state::Refused;
    use wardian_time::{Nanos, RunState, TickConfig, TickPolicy};

    struct RtcTwin {
        clock: Clock,
        chip: Arc<Recorder>,
        routing: LegacyRouting,
        ticks: TickConfig,
        rtc: Arc<Rtc>,
    }

    impl Twin for RtcTwin {
        type State = RtcState;

        fn fresh(random: &mut Random) -> RtcTwin {
            let clock = Clock::at_wall(Nanos(1_795_522_000_123_456_789));
            let (chip, routing) = (Recorder::new(), LegacyRouting::default());
            let policy = random.one_of(&[
                TickPolicy::LateOne,
                TickPolicy::Replay,
                TickPolicy::Sync,
                TickPolicy::Async,
            ]);
            let ticks = TickConfig { policy, align: random.once_in(2) };
            let memory = MemorySize { low: 1 << 30, high: 0 };
            let rtc = Rtc::new(&clock.queue, chip.line(GSI_RTC), memory, routing.clone(), ticks);
            RtcTwin { clock, chip, routing, ticks, rtc }
        }

        fn restored(other: &RtcTwin, state: &RtcState) -> Result<RtcTwin, Refused> {
            let (clock, chip, routing) = (other.clock.twin(), Recorder::new(), LegacyRouting::default());
            routing.set(other.routing.is_on());
            let rtc = Rtc::restore(&clock.queue, chip.line(GSI_RTC), routing.clone(), other.ticks, state)?;
            Ok(RtcTwin { clock, chip, routing, ticks: other.ticks, rtc })
        }

        fn save(&self) -> RtcState {
            let state = self.rtc.save();
            self.chip.news();
            state
        }

        fn clock(&self) -> &Clock {
            &self.clock
        }

        fn live(&self, random: &mut Random) -> String {
            let mut data = [0];
            let register = random.one_of(&[0, 1, 2, 3, 4, 5, 7, 9, 0x0a, 0x0b, 0x0b, 0x0c, 0x0d, 0x32, 0x7f]);
            match random.below(12) {
                0..3 => self.rtc.write(at(0), &[register | random.one_of(&[0, 0, 0, 0x80])]),
                3..5 => self.rtc.write(at(1), &[random.next() as u8]),
                // Rates and enables that a system sets.
                5 => {
                    self.rtc.write(at(0), &[0x0a]);
                    self.rtc.write(at(1), &[random.one_of(&[0x26, 0x26, 0x2f, 0x23, 0x20, 0x76])]);
                }
                6 => {
                    self.rtc.write(at(0), &[0x0b]);
                    self.rtc.write(at(1), &[random.one_of(&[0x02, 0x42, 0x52, 0x72, 0x22, 0x82, 0x46])]);
                }
                7 => {
                    for register in [1, 3, 5] {
                        self.rtc.write(at(0), &[register]);
                        self.rtc.write(at(1), &[random.one_of(&[0xff, 0xc0, 0x12, 0x30])]);
                    }
                }
                8 => {
                    self.rtc.write(at(0), &[0x0c]);
                    self.rtc.read(at(1), &mut data);
                }
                9 if random.once_in(8) => self.routing.set(random.once_in(2)),
                10 => self.clock.run(Nanos(random.below(2_000_000_000))),
                _ => self.rtc.read(at(1), &mut data),
            }
            format!("{data:?} {:?} {}", self.chip.news(), self.rtc.nmi_masked())
        }

        fn raised(&self) -> Vec<u32> {
            self.chip.high()
        }
    }

    #[test]
    fn a_restored_clock_lives_on() {
        twin::lives_on::<RtcTwin>(200);
        twin::is_not_upset::<RtcTwin>(60);
        twin::restores_golden::<RtcTwin>(|state| state.saved_at_ns);
    }

    #[test]
    fn impossible_states_are_refused_by_name() {
        let one = RtcTwin::fresh(&mut Random::new(1));
        one.clock.run(Nanos(5_000));
        let refusal = |change: fn(&mut RtcState)| twin::refusal(&one, change);
        assert_eq!(refusal(|_| ()), "taken");
        assert_eq!(refusal(|s| s.saved_at_ns = 5_001), "saved_at_ns");
        assert_eq!(refusal(|s| s.index = 0x80), "index");
        assert_eq!(refusal(|s| s.registers[0x0a] |= 0x80), "registers[0x0a]");
        assert_eq!(refusal(|s| s.registers[0x0b] = 0x92), "registers[0x0b]");
        assert_eq!(refusal(|s| s.registers[0x0c] = 1), "registers[0x0c]");
        assert_eq!(refusal(|s| s.registers[0x0d] = 1), "registers[0x0d]");
        assert_eq!(refusal(|s| s.flags = 1), "flags");
        assert_eq!(refusal(|s| s.offset_s = i64::MIN), "offset_s");
        assert_eq!(refusal(|s| s.offset_ns = 1_000_000_000), "offset_ns");
        assert_eq!(refusal(|s| s.seen_s += 1), "seen_s");
        assert_eq!(refusal(|s| s.tick.run = RunState::Stopped), "tick.run");
        assert_eq!(refusal(|s| s.registers[0x0a] = 0x2f), "tick.run");
        let slow = RunState::Periodic { clock_hz: 1, first: 0, every: 32, next: 0 };
        assert_eq!(twin::refusal(&one, |s| s.tick.run = slow), "tick.run.clock_hz");
        assert_eq!(refusal(|s| s.tick.backlog = u64::MAX), "tick.backlog");
    }

    #[test]
    fn an_alarm_that_time_stepped_over_comes_after_restore() {
        let one = RtcTwin::fresh(&mut Random::new(1));
        for (register, value) in [(1, 0xff), (3, 0xff), (5, 0xff), (0x0b, 0x22)] {
            one.rtc.write(at(0), &[register]);
            one.rtc.write(at(1), &[value]);
        }
        let state = one.save();
        one.clock.base.advance(Nanos(10_000_000_000));
        let two = RtcTwin::restored(&one, &state).unwrap();
        two.clock.run(Nanos(0));
        assert_eq!(two.chip.edges(GSI_RTC), 1);
    }
}
