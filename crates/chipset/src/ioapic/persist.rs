//! What is saved of the IOAPIC. Its inputs are re-raised by the devices that hold them.

use std::sync::Mutex;

use serde::{Deserialize, Serialize};
use wardian_state::check::{Wrong, ensure, only_bits};
use wardian_state::{Record, Refused};

use super::{IOAPIC_PINS, Ioapic, IoapicRegs, REMOTE_IRR, WRITABLE, is_level};

/// Inputs that something is wired to: all but 0, see [`ISA_OVERRIDES`](crate::irqchip::ISA_OVERRIDES).
const WIRED: u32 = (1 << IOAPIC_PINS) - 2;

/// The IOAPIC as it is saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoapicState {
    /// Its ID.
    pub id: u8,
    /// The register that the window shows.
    pub select: u8,
    /// Redirection entries.
    pub entries: [u64; IOAPIC_PINS],
    /// Levels of the inputs as they were last seen, a bit for each. Whoever holds one up does so again after a
    /// restore, which is no edge then; the 8259 pair has seen the same levels.
    pub lines: u32,
    /// vCPU that wins the next arbitration among equals.
    pub next_arbiter: u32,
}

impl Record for IoapicState {
    const KIND: &'static str = "ioapic";
    const VERSION: u16 = 1;
}

impl Ioapic {
    /// What to save.
    pub(crate) fn save(&self, next_arbiter: u32) -> IoapicState {
        let regs = self.lock();
        IoapicState {
            id: regs.id as u8,
            select: regs.select,
            entries: regs.entries,
            lines: regs.lines,
            next_arbiter,
        }
    }

    /// The IOAPIC that was saved as `state`.
    pub(crate) fn restore(state: &IoapicState) -> Result<Ioapic, Refused> {
        check(state).map_err(Wrong::in_record::<IoapicState>)?;
        Ok(Ioapic {
            state: Mutex::new(IoapicRegs {
                id: state.id.into(),
                select: state.select,
                entries: state.entries,
                lines: state.lines,
            }),
        })
    }
}

fn check(state: &IoapicState) -> Result<(), Wrong> {
    only_bits("id", state.id, 0x0fu8)?;
    only_bits("lines", state.lines, WIRED)?;
    for (pin, entry) in state.entries.iter().enumerate() {
        let field = format!("entries[{pin}]");
        only_bits(&field, *entry, WRITABLE | REMOTE_IRR)?;
        ensure(entry & REMOTE_IRR == 0 || is_level(*entry), &field, || "an edge is in service")?;
    }
    Ok(())
}
