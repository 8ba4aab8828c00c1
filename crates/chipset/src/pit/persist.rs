//! What is saved of the PIT. It re-raises nothing: its line carries edges alone.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use wardian_irq::{Line, TickLink};
use wardian_state::check::{Wrong, at_most, ensure};
use wardian_state::{Record, Refused};
use wardian_time::{RunState, Tick, TickConfig, TickState, TimerQueue, not_before_saved};

use super::channel::persist::ChannelState;
use super::{PIT_HZ, Pit, PitRegs};
use crate::edge_ticks::{EdgeTicks, check_link};

/// The PIT as it is saved. Times in ticks are those of its clock since guest time 0.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PitState {
    /// When it was saved, on the time line.
    pub saved_at_ns: u64,
    /// The counters.
    pub channels: [ChannelState; 3],
    /// Port 61h as written, bits 3:0; bit 0 is the gate of counter 2, the other gates are open.
    pub port_61: u8,
    /// Rising edges of counter 0.
    pub tick: TickState,
    /// How far such an edge is on its way.
    pub link: TickLink,
}

impl Record for PitState {
    const KIND: &'static str = "pit";
    const VERSION: u16 = 1;
}

impl Pit {
    /// What to save.
    #[must_use]
    pub fn save(&self) -> PitState {
        let state = self.lock();
        PitState {
            saved_at_ns: self.timer.base().timeline().0,
            channels: std::array::from_fn(|number| state.channels[number].save()),
            port_61: state.control,
            tick: state.tick.save(),
            link: self.ticks.link(),
        }
    }

    /// The PIT that was saved as `state`, to be built as [`Pit::new`] says once `queue`'s base stands where it did.
    ///
    /// # Errors
    /// When a PIT cannot be in that state.
    pub fn restore(
        queue: &Arc<TimerQueue>,
        line: Line,
        ticks: TickConfig,
        state: &PitState,
    ) -> Result<Arc<Pit>, Refused> {
        let regs = PitRegs::restore(queue, ticks, state).map_err(Wrong::in_record::<PitState>)?;
        let pit = Pit::build(queue, line, regs);
        pit.restore_link(state.link);
        Ok(pit)
    }
}

impl PitRegs {
    fn restore(queue: &TimerQueue, ticks: TickConfig, state: &PitState) -> Result<PitRegs, Wrong> {
        let base = queue.base();
        not_before_saved("saved_at_ns", state.saved_at_ns, base)?;
        at_most("port_61", state.port_61, 0xfu8)?;
        check_link(&state.link)?;
        let now = base.now().to_ticks(PIT_HZ);
        let channel = |number: usize| {
            let gate = number < 2 || state.port_61 & 1 != 0;
            state.channels[number]
                .restore(gate, now)
                .map_err(|e| e.within(format_args!("channels[{number}]")))
        };
        let channels = [channel(0)?, channel(1)?, channel(2)?];
        let tick = Tick::restore(ticks, &state.tick, base.timeline()).map_err(|e| e.within("tick"))?;
        let every = state.tick.run.every(PIT_HZ).map_err(|e| e.within("tick"))?;
        let rises = channels[0].rises(now).and_then(|rises| rises.1);
        ensure(every == rises, "tick.run", || {
            format!("a period of {every:?}, where counter 0 has {rises:?}")
        })?;
        if let RunState::Periodic { first, .. } = state.tick.run {
            at_most("tick.run.first", first, u64::MAX >> 1)?;
        }
        Ok(PitRegs { channels, tick, control: state.port_61 })
    }
}
