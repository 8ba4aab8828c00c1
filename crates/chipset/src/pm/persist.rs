//! What is saved of the power-management block. It re-raises the SCI if an enabled event waits.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use wardian_irq::Line;
use wardian_state::check::{Wrong, at_most, only_bits};
use wardian_state::{Record, Refused};
use wardian_time::{TimeBase, TimerQueue, not_before_saved};

use super::{CONTROL_KEPT, ENABLES, PWRBTN, Pm, State, TMR, ticks};
use crate::power::PowerSink;
use crate::wire::Wire;

/// The power-management block as it is saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PmState {
    /// When it was saved, on the time line.
    pub saved_at_ns: u64,
    /// PM1 status register.
    pub pm1_status: u16,
    /// PM1 enable register.
    pub pm1_enable: u16,
    /// PM1 control register, without its constant bit.
    pub pm1_control: u16,
    /// Status register of general-purpose event block 0.
    pub gpe0_status: u16,
    /// Its enable register.
    pub gpe0_enable: u16,
    /// Changes of the PM timer's top bit since guest time 0 that are accounted for.
    pub timer_halves: u64,
}

impl Record for PmState {
    const KIND: &'static str = "pm";
    const VERSION: u16 = 1;
}

impl Pm {
    /// What to save.
    #[must_use]
    pub fn save(&self) -> PmState {
        let state = self.change(|state, _| *state);
        PmState {
            saved_at_ns: self.base.timeline().0,
            pm1_status: state.status,
            pm1_enable: state.enable,
            pm1_control: state.control,
            gpe0_status: state.gpe_status,
            gpe0_enable: state.gpe_enable,
            timer_halves: state.halves,
        }
    }

    /// The block that was saved as `state`, to be built as [`Pm::new`] says once `queue`'s base stands where it did.
    ///
    /// # Errors
    /// When a block cannot be in that state.
    pub fn restore(
        queue: &Arc<TimerQueue>,
        sci: Line,
        power: Arc<dyn PowerSink>,
        state: &PmState,
    ) -> Result<Arc<Pm>, Refused> {
        let registers = State::restore(queue.base(), state).map_err(Wrong::in_record::<PmState>)?;
        let pm = Pm::build(queue, sci, power, registers);
        pm.change(|_, _| ());
        Ok(pm)
    }
}

impl State {
    fn restore(base: &TimeBase, state: &PmState) -> Result<State, Wrong> {
        not_before_saved("saved_at_ns", state.saved_at_ns, base)?;
        only_bits("pm1_status", state.pm1_status, TMR | PWRBTN)?;
        only_bits("pm1_enable", state.pm1_enable, ENABLES)?;
        only_bits("pm1_control", state.pm1_control, CONTROL_KEPT)?;
        at_most("timer_halves", state.timer_halves, ticks(base.now()) >> 31)?;
        Ok(State {
            status: state.pm1_status,
            enable: state.pm1_enable,
            control: state.pm1_control,
            gpe_status: state.gpe0_status,
            gpe_enable: state.gpe0_enable,
            halves: state.timer_halves,
            sci: Wire::default(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{Pm, PmState};
    use crate::layout::GSI_SCI;
    use crate::power::tests::Requests;
    use crate::testing::twin::{self, Random, Twin};
    use crate::testing::{Clock, at};
    use crate::wire::tests::Recorder;
    use std::sync::Arc;
    use wardian_bus::Device;
    use wardian_state::Refused;
    use wardian_time::Nanos;

    struct PmTwin {
        clock: Clock,
        chip: Arc<Recorder>,
        power: Arc<Requests>,
        pm: Arc<Pm>,
    }

    impl Twin for PmTwin {
        type State = PmState;

        fn fresh(_random: &mut Random) -> PmTwin {
            let (clock, chip, power) = (Clock::new(), Recorder::new(), Arc::new(Requests::default()));
            let pm = Pm::new(&clock.queue, chip.line(GSI_SCI), Arc::clone(&power) as _);
            PmTwin { clock, chip, power, pm }
        }

        fn restored(other: &PmTwin, state: &PmState) -> Result<PmTwin, Refused> {
            let (clock, chip, power) = (other.clock.twin(), Recorder::new(), Arc::new(Requests::default()));
            let pm = Pm::restore(&clock.queue, chip.line(GSI_SCI), Arc::clone(&power) as _, state)?;
            Ok(PmTwin { clock, chip, power, pm })
        }

        fn save(&self) -> PmState {
            let state = self.pm.save();
            self.chip.news();
            state
        }

        fn clock(&self) -> &Clock {
            &self.clock
        }

        fn live(&self, random: &mut Random) -> String {
            let mut data = [0; 4];
            match random.below(12) {
                0 => self.pm.press_power_button(),
                1 => self.pm.raise_event(random.below(20) as u8),
                2..8 => self.pm.write(at(random.below(0x20)), &(random.next() as u16).to_le_bytes()),
                8 => self.clock.run(Nanos(random.below(400_000_000_000))),
                _ => self.pm.read(at(random.below(0x20)), &mut data),
            }
            format!("{data:?} {:?} {:?}", self.chip.news(), self.power.take())
        }

        fn raised(&self) -> Vec<u32> {
            self.chip.high()
        }
    }

    #[test]
    fn a_restored_block_lives_on() {
        twin::lives_on::<PmTwin>(200);
        twin::is_not_upset::<PmTwin>(60);
        twin::restores_golden::<PmTwin>(|state| state.saved_at_ns);
    }

    #[test]
    fn impossible_states_are_refused_by_name() {
        let one = PmTwin::fresh(&mut Random::new(1));
        one.clock.run(Nanos(5_000));
        let refusal = |change: fn(&mut PmState)| twin::refusal(&one, change);
        assert_eq!(refusal(|_| ()), "taken");
        assert_eq!(refusal(|s| s.saved_at_ns = 5_001), "saved_at_ns");
        assert_eq!(refusal(|s| s.pm1_status = 2), "pm1_status");
        assert_eq!(refusal(|s| s.pm1_enable = 0x8000), "pm1_enable");
        assert_eq!(refusal(|s| s.pm1_control = 1), "pm1_control");
        assert_eq!(refusal(|s| s.timer_halves = 1), "timer_halves");
    }
}
