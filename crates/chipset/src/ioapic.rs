//! The I/O APIC: an 82093AA with version 20h, so that it has an EOI register (Intel 82093AA data sheet,
//! section 3; ICH9 data sheet, 13.5).

pub(crate) mod persist;

use std::sync::{Mutex, MutexGuard, PoisonError};

use wardian_irq::Delivery;

use crate::lapic::message::{Message, Mode};

/// Physical address of the IOAPIC page.
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
/// Number of inputs.
pub const IOAPIC_PINS: usize = 24;

/// Registers of the page.
const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;
const EOI: u64 = 0x40;
/// Version 20h, last redirection entry 23.
const VERSION: u32 = 0x0017_0020;

/// Bits of a redirection entry.
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
/// Vector, delivery mode, destination mode, polarity, trigger, mask, destination.
const WRITABLE: u64 = 0xff00_0000_0001_afff;

/// The state of the chip: registers and input levels.
#[derive(Clone, Debug)]
struct IoapicRegs {
    id: u32,
    select: u8,
    entries: [u64; IOAPIC_PINS],
    /// Levels of the inputs, a bit for each.
    lines: u32,
}

/// A message that an input sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) pin: usize,
    pub(crate) message: Message,
}

/// The chip. It does not send messages itself but returns them, so that no other chip's lock is ever taken
/// under its own.
#[derive(Debug)]
pub(crate) struct Ioapic {
    state: Mutex<IoapicRegs>,
}

fn is_level(entry: u64) -> bool {
    entry & LEVEL != 0 && matches!(Mode::of(entry as u32), Mode::Fixed | Mode::Lowest)
}

impl IoapicRegs {
    fn message(&self, pin: usize) -> Message {
        let entry = self.entries[pin];
        Message {
            dest: (entry >> 56) as u32,
            wide: false,
            logical: entry & 1 << 11 != 0,
            mode: Mode::of(entry as u32),
            vector: entry as u8,
            level: is_level(entry),
        }
    }

    /// The message of a level-triggered input that is asserted, unmasked and not in service yet.
    fn level_request(&mut self, pin: usize) -> Option<Request> {
        let entry = self.entries[pin];
        if !is_level(entry) || entry & (MASKED | REMOTE_IRR) != 0 || self.lines >> pin & 1 == 0 {
            return None;
        }
        self.entries[pin] |= REMOTE_IRR;
        Some(Request { pin, message: self.message(pin) })
    }

    fn read_indirect(&self) -> u32 {
        match self.select {
            0 | 2 => self.id << 24,
            1 => VERSION,
            index @ 0x10..0x40 => {
                let entry = self.entries[usize::from(index - 0x10) / 2];
                (entry >> (u32::from(index & 1) * 32)) as u32
            }
            _ => 0,
        }
    }

    fn write_indirect(&mut self, value: u32) -> Option<Request> {
        match self.select {
            0 => self.id = value >> 24 & 0xf,
            index @ 0x10..0x40 => {
                let pin = usize::from(index - 0x10) / 2;
                let shift = u32::from(index & 1) * 32;
                let writable = WRITABLE & 0xffff_ffff << shift;
                let entry = &mut self.entries[pin];
                *entry = *entry & !writable | u64::from(value) << shift & writable;
                if !is_level(*entry) {
                    *entry &= !REMOTE_IRR;
                }
                return self.level_request(pin);
            }
            _ => {}
        }
        None
    }

    fn eoi(&mut self, vector: u8) -> Vec<Request> {
        let mut requests = Vec::new();
        for pin in 0..IOAPIC_PINS {
            let entry = self.entries[pin];
            if entry & REMOTE_IRR != 0 && entry as u8 == vector {
                self.entries[pin] &= !REMOTE_IRR;
                requests.extend(self.level_request(pin));
            }
        }
        requests
    }
}

impl Ioapic {
    pub(crate) fn new() -> Ioapic {
        Ioapic {
            state: Mutex::new(IoapicRegs { id: 0, select: 0, entries: [MASKED; IOAPIC_PINS], lines: 0 }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, IoapicRegs> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the level of an input: the message to send, or what became of the request without one.
    /// An edge on a masked input is lost (82093AA, 3.2.4, interrupt mask).
    pub(crate) fn set_line(&self, pin: usize, level: bool) -> Result<Request, Delivery> {
        let mut state = self.lock();
        let Some(entry) = state.entries.get(pin).copied() else {
            return Err(Delivery::Masked);
        };
        let was = state.lines >> pin & 1 != 0;
        state.lines = state.lines & !(1 << pin) | u32::from(level) << pin;
        if !level || entry & MASKED != 0 {
            return Err(Delivery::Masked);
        }
        if is_level(entry) {
            return state.level_request(pin).ok_or(Delivery::Coalesced);
        }
        if was { Err(Delivery::Coalesced) } else { Ok(Request { pin, message: state.message(pin) }) }
    }

    /// The vector that an edge on this input sends now, unless the input is masked.
    pub(crate) fn vector(&self, pin: usize) -> Option<u8> {
        let state = self.lock();
        state.entries.get(pin).filter(|entry| *entry & MASKED == 0).map(|entry| *entry as u8)
    }

    /// No local APIC took the message of this input: it is not in service.
    pub(crate) fn refused(&self, pin: usize) {
        self.lock().entries[pin] &= !REMOTE_IRR;
    }

    /// A local APIC handled this level-triggered vector.
    pub(crate) fn eoi(&self, vector: u8) -> Vec<Request> {
        self.lock().eoi(vector)
    }

    /// The level-triggered inputs that wait although nothing of theirs is in service: refused before.
    pub(crate) fn waiting(&self) -> Vec<Request> {
        let mut state = self.lock();
        (0..IOAPIC_PINS).filter_map(|pin| state.level_request(pin)).collect()
    }

    /// Reads 32 bits.
    pub(crate) fn read(&self, offset: u64) -> u32 {
        let state = self.lock();
        match offset {
            SELECT => state.select.into(),
            WINDOW => state.read_indirect(),
            _ => 0,
        }
    }

    /// Writes 32 bits.
    pub(crate) fn write(&self, offset: u64, value: u32) -> Vec<Request> {
        let mut state = self.lock();
        match offset {
            SELECT => state.select = value as u8,
            WINDOW => return state.write_indirect(value).into_iter().collect(),
            EOI => return state.eoi(value as u8),
            _ => {}
        }
        Vec::new()
    }

    /// Named values, for `inspect`.
    pub(crate) fn inspect(&self) -> Vec<(String, String)> {
        let state = self.lock().clone();
        let mut values = vec![
            ("id".to_owned(), state.id.to_string()),
            ("select".to_owned(), format!("{:#x}", state.select)),
            ("lines".to_owned(), format!("{:#08x}", state.lines)),
        ];
        for (pin, entry) in state.entries.iter().enumerate() {
            if *entry != MASKED {
                values.push((format!("pin{pin}"), format!("{entry:#018x}")));
            }
        }
        values
    }
}

#[cfg(test)]
mod tests {
    use super::{IOAPIC_PINS, Ioapic, Mode};
    use wardian_irq::Delivery;

    fn entry(chip: &Ioapic, pin: u32, value: u64) -> usize {
        chip.write(0, 0x11 + pin * 2);
        let high = chip.write(0x10, (value >> 32) as u32).len();
        chip.write(0, 0x10 + pin * 2);
        high + chip.write(0x10, value as u32).len()
    }

    fn read(chip: &Ioapic, index: u32) -> u32 {
        chip.write(0, index);
        chip.read(0x10)
    }

    #[test]
    fn registers_read_as_the_data_sheet_says() {
        let chip = Ioapic::new();
        assert_eq!(read(&chip, 1), 0x0017_0020);
        for pin in 0..IOAPIC_PINS as u32 {
            assert_eq!(read(&chip, 0x10 + 2 * pin), 0x1_0000);
            assert_eq!(read(&chip, 0x11 + 2 * pin), 0);
        }
        entry(&chip, 5, u64::MAX);
        assert_eq!(read(&chip, 0x1a), 0x1_afff);
        assert_eq!(read(&chip, 0x1b), 0xff00_0000);
        chip.write(0, 0);
        chip.write(0x10, 0x0f00_0000);
        assert_eq!(read(&chip, 0), 0x0f00_0000);
        assert_eq!(read(&chip, 0x40), 0);
        assert_eq!(chip.set_line(24, true), Err(Delivery::Masked));
    }

    #[test]
    fn edges_come_once_and_are_lost_while_masked() {
        let chip = Ioapic::new();
        entry(&chip, 3, 0x1_0033);
        assert_eq!(chip.set_line(3, true), Err(Delivery::Masked));
        entry(&chip, 3, 0x0200_0000_0000_0933);
        assert_eq!(chip.set_line(3, true), Err(Delivery::Coalesced), "no new edge");
        let _ = chip.set_line(3, false);
        let request = chip.set_line(3, true).unwrap();
        assert_eq!((request.message.vector, request.message.mode), (0x33, Mode::Lowest));
        assert!(request.message.logical && !request.message.level && request.message.dest == 2);
    }

    #[test]
    fn a_level_line_is_in_service_until_its_eoi() {
        let chip = Ioapic::new();
        entry(&chip, 9, 0x8039);
        assert!(chip.set_line(9, true).unwrap().message.level);
        assert_eq!(read(&chip, 0x22) & 1 << 14, 1 << 14);
        assert_eq!(chip.set_line(9, true), Err(Delivery::Coalesced));
        assert_eq!(chip.eoi(0x40), []);
        assert_eq!(chip.eoi(0x39).len(), 1, "still asserted: again");
        let _ = chip.set_line(9, false);
        assert_eq!(chip.write(0x40, 0x39), []);
        assert_eq!(read(&chip, 0x22) & 1 << 14, 0);
    }

    #[test]
    fn unmasking_delivers_a_waiting_level_and_edge_mode_clears_remote_irr() {
        let chip = Ioapic::new();
        entry(&chip, 9, 0x1_8039);
        assert_eq!(chip.set_line(9, true), Err(Delivery::Masked));
        assert_eq!(entry(&chip, 9, 0x8039), 1);
        entry(&chip, 9, 0x1_0039);
        assert_eq!(read(&chip, 0x22), 0x1_0039);
        assert_eq!(entry(&chip, 9, 0x8039), 1);
        chip.refused(9);
        assert_eq!(chip.waiting().len(), 1);
        assert_eq!(chip.waiting().len(), 0);
    }
}
