//! Interrupt messages: what travels from IOAPIC, MSI and ICR to local APICs.

use wardian_irq::MsiMessage;

/// Delivery mode (Intel SDM vol. 3A, 11.6.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Fixed,
    Lowest,
    Smi,
    Reserved,
    Nmi,
    Init,
    Startup,
    ExtInt,
}

impl Mode {
    /// From bits 10:8 of an ICR, LVT entry, redirection entry or MSI data word.
    pub(crate) fn of(word: u32) -> Mode {
        match word >> 8 & 7 {
            0 => Mode::Fixed,
            1 => Mode::Lowest,
            2 => Mode::Smi,
            4 => Mode::Nmi,
            5 => Mode::Init,
            6 => Mode::Startup,
            7 => Mode::ExtInt,
            _ => Mode::Reserved,
        }
    }
}

/// One message to a set of local APICs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Message {
    /// Destination field.
    pub(crate) dest: u32,
    /// The destination field has 32 bits (sent by an x2APIC); 8 otherwise.
    pub(crate) wide: bool,
    /// Logical destination mode.
    pub(crate) logical: bool,
    /// What to do at the destination.
    pub(crate) mode: Mode,
    /// Vector, or start-up page.
    pub(crate) vector: u8,
    /// Level-triggered: its EOI is broadcast to the IOAPIC.
    pub(crate) level: bool,
}

impl Message {
    /// Whether the destination field means everybody.
    pub(crate) fn is_broadcast(&self) -> bool {
        self.dest == if self.wide { u32::MAX } else { 0xff }
    }

    /// Intel SDM vol. 3A, 11.11. `None` for an address outside FEE0_0000h-FEEF_FFFFh and for the
    /// de-assertion of a level-triggered message.
    pub(crate) fn from_msi(msi: MsiMessage) -> Option<Message> {
        const LEVEL: u32 = 1 << 15;
        const ASSERT: u32 = 1 << 14;
        if msi.address >> 20 != 0xfee || msi.data & (LEVEL | ASSERT) == LEVEL {
            return None;
        }
        let redirect = msi.address & 1 << 3 != 0;
        let mode = match Mode::of(msi.data) {
            Mode::Fixed if redirect => Mode::Lowest,
            mode => mode,
        };
        Some(Message {
            dest: (msi.address >> 12) as u32 & 0xff,
            wide: false,
            logical: msi.address & 1 << 2 != 0,
            mode,
            vector: msi.data as u8,
            level: msi.data & LEVEL != 0,
        })
    }
}

/// To whom an IPI goes beside its destination field (ICR bits 19:18).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shorthand {
    None,
    Own,
    All,
    Others,
}

/// An inter-processor interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ipi {
    pub(crate) shorthand: Shorthand,
    pub(crate) message: Message,
}

impl Ipi {
    /// From an ICR value: the destination in bits 63:32 if `wide`, else 63:56. `None` for what has no
    /// effect: INIT level de-assert, reserved modes, INIT and start-up to oneself by shorthand.
    /// IPIs are edge-triggered whatever ICR bit 15 says (Intel SDM vol. 3A, 11.6.1, trigger mode).
    pub(crate) fn from_icr(icr: u64, wide: bool) -> Option<Ipi> {
        let low = icr as u32;
        let mode = Mode::of(low);
        let shorthand = match low >> 18 & 3 {
            0 => Shorthand::None,
            1 => Shorthand::Own,
            2 => Shorthand::All,
            _ => Shorthand::Others,
        };
        let deassert = low & (1 << 15) != 0 && low & (1 << 14) == 0;
        let own = matches!(shorthand, Shorthand::Own | Shorthand::All);
        match mode {
            Mode::Smi | Mode::Reserved | Mode::ExtInt => return None,
            Mode::Init if deassert || own => return None,
            Mode::Startup if own => return None,
            _ => {}
        }
        Some(Ipi {
            shorthand,
            message: Message {
                dest: if wide { (icr >> 32) as u32 } else { (icr >> 56) as u32 },
                wide,
                logical: low & (1 << 11) != 0,
                mode,
                vector: low as u8,
                level: false,
            },
        })
    }
}
