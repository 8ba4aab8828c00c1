//! INTx: which interrupt input a pin leads to, and inputs that several functions share.

use std::sync::{Arc, Mutex};

use wardian_irq::{Delivery, Gsi, IrqChip, Line, MsiMessage};

use crate::layout::GSI_INTX;
use crate::wire::lock;

/// The input of pin `pin` (1 = INTA# to 4 = INTD#) of device `device` on the root bus.
#[must_use]
pub fn intx_gsi(device: u8, pin: u8) -> Gsi {
    GSI_INTX[(usize::from(device) + usize::from(pin.saturating_sub(1))) % GSI_INTX.len()]
}

/// The inputs of [`GSI_INTX`]: each is up while one of its functions holds it up (wired-OR).
pub struct IntxLines {
    chip: Arc<dyn IrqChip>,
    /// Per input, the functions that hold it: bit `device * 4 + pin`. Locked over the call to the chip, so
    /// that the chip sees the changes in order; the chip calls nobody back.
    holders: [Mutex<u128>; GSI_INTX.len()],
}

impl IntxLines {
    /// Lines of `chip`, all down.
    #[must_use]
    pub fn new(chip: Arc<dyn IrqChip>) -> Arc<IntxLines> {
        Arc::new(IntxLines { chip, holders: Default::default() })
    }

    /// The line of pin `pin` (1-4) of device `device` (0-31).
    #[must_use]
    pub fn line(self: &Arc<Self>, device: u8, pin: u8) -> Line {
        let gsi = intx_gsi(device, pin);
        let index = GSI_INTX.iter().position(|input| *input == gsi).unwrap_or(0);
        let bit = 1 << ((u32::from(device) * 4 + u32::from(pin.saturating_sub(1))) % u128::BITS);
        Line::new(Arc::new(Holder { lines: Arc::clone(self), index, bit }), gsi)
    }
}

struct Holder {
    lines: Arc<IntxLines>,
    index: usize,
    bit: u128,
}

impl IrqChip for Holder {
    fn set_line(&self, gsi: Gsi, level: bool) -> Delivery {
        let mut holders = lock(&self.lines.holders[self.index]);
        let before = *holders;
        if level {
            *holders |= self.bit;
        } else {
            *holders &= !self.bit;
        }
        if (before == 0) == (*holders == 0) {
            return Delivery::Coalesced;
        }
        self.lines.chip.set_line(gsi, *holders != 0)
    }

    fn signal_msi(&self, message: MsiMessage) -> Delivery {
        self.lines.chip.signal_msi(message)
    }
}
