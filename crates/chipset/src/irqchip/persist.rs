//! What is saved of the interrupt chips, and how they come back before the devices that raise them.

#[cfg(test)]
mod board_tests;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use serde::{Deserialize, Serialize};
use wardian_irq::{Gsi, IrqChip};
use wardian_state::check::Wrong;
use wardian_state::{Record, Refused};
use wardian_time::{TickConfig, TimerQueue};

use super::ticks::Ticks;
use super::{MAX_CPUS, SoftIrqChip, TIMER_PIN};
use crate::ioapic::Ioapic;
use crate::ioapic::persist::IoapicState;
use crate::lapic::Lapic;
use crate::lapic::persist::{LapicState, check_vcpu};
use crate::pic::Pic;
use crate::pic::persist::PicState;

/// The interrupt chips of a machine as they are saved: a record each. Ticks that are on their way through them are
/// saved with their timers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IrqChipState {
    /// Local APICs, one for each vCPU.
    pub lapics: Vec<LapicState>,
    /// IOAPIC.
    pub ioapic: IoapicState,
    /// 8259 pair.
    pub pic: PicState,
}

/// Levels of the ISA interrupts that are those of the IOAPIC's inputs: interrupt 0 comes to input 2.
fn isa_levels(lines: u32) -> u16 {
    let timer = lines >> TIMER_PIN & 1;
    (lines & 0xffff & !(1 << TIMER_PIN | 1) | timer) as u16
}

impl SoftIrqChip {
    /// What to save. No vCPU and no timer thread runs.
    #[must_use]
    pub fn save(&self) -> IrqChipState {
        IrqChipState {
            lapics: self.lapics.iter().map(|lapic| lapic.save()).collect(),
            ioapic: self.ioapic.save(self.turn.load(Ordering::Relaxed) as u32),
            pic: self.pic.save(),
        }
    }

    /// The chips that were saved as `state`, for `cpus` vCPUs, once `queue`'s base stands where it did. Then come the
    /// devices, each of which raises the lines that it holds, then [`SoftIrqChip::settle_lines`].
    ///
    /// # Errors
    /// When chips cannot be in that state, or not those of `cpus` vCPUs.
    pub fn restore(
        cpus: usize,
        queue: &Arc<TimerQueue>,
        ticks: TickConfig,
        state: &IrqChipState,
    ) -> Result<Arc<SoftIrqChip>, Refused> {
        let saved = state.lapics.len();
        if saved != cpus || !(1..=MAX_CPUS).contains(&cpus) {
            let why = format!("there are {saved}, for {cpus} vCPUs");
            return Err(Refused { kind: LapicState::KIND, why });
        }
        check_vcpu("next_arbiter", state.ioapic.next_arbiter, cpus)
            .map_err(Wrong::in_record::<IoapicState>)?;
        let ioapic = Ioapic::restore(&state.ioapic)?;
        let pic = Pic::restore(&state.pic, isa_levels(state.ioapic.lines))?;
        let lapic = |(cpu, state): (usize, &LapicState)| {
            let lint0 = if cpu == 0 { Arc::clone(pic.output()) } else { Arc::default() };
            Lapic::restore(cpu as u32, queue, lint0, ticks, state)
        };
        let lapics = state.lapics.iter().enumerate().map(lapic).collect::<Result<_, _>>()?;
        Ok(Arc::new(SoftIrqChip {
            lapics,
            ioapic,
            pic,
            ticks: Ticks::default(),
            turn: AtomicUsize::new(state.ioapic.next_arbiter as usize),
            unclaimed: AtomicU32::new(state.ioapic.lines),
        }))
    }

    /// All devices are restored: lines that were up when the chips were saved and that no device has raised again
    /// go down.
    pub fn settle_lines(&self) {
        let lines = self.unclaimed.load(Ordering::Acquire);
        for pin in (0..32).filter(|pin| lines >> pin & 1 != 0) {
            self.set_line(Gsi(pin), false);
        }
    }

    /// Whether raising input `pin` says nothing new, because it was up already when the chips were saved.
    pub(super) fn is_raised_again(&self, pin: usize, level: bool) -> bool {
        if self.unclaimed.load(Ordering::Relaxed) == 0 {
            return false;
        }
        let bit = 1u32.checked_shl(pin as u32).unwrap_or(0);
        self.unclaimed.fetch_and(!bit, Ordering::AcqRel) & bit != 0 && level
    }
}
