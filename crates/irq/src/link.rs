//! [`TickLink`]: how far a timer's tick is on its way through the chip; saved with the timer.

use serde::{Deserialize, Serialize};

/// Whether a tick that has come due waits for its vCPU to look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Due {
    /// It does not.
    #[default]
    No,
    /// It does.
    Waits,
    /// It does, and the vCPU was halted when it came due.
    WaitsAsleep,
}

/// What the guest acknowledges when it takes the interrupt of a timer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Awaited {
    /// This vector, if the IOAPIC sends one.
    pub vector: Option<u8>,
    /// This ISA interrupt at the 8259 pair.
    pub isa: Option<u8>,
}

/// What a chip keeps for a [`TickSource`](crate::TickSource).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TickLink {
    /// To be offered.
    pub due: Due,
    /// Refused because the guest masks the interrupt: tried again when that changes.
    pub refused: bool,
    /// Raised and not taken.
    pub awaited: Option<Awaited>,
}
