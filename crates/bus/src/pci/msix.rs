//! MSI-X (PCI Local Bus Specification 3.0, 6.8.2).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use wardian_irq::{Delivery, IrqChip, MsiMessage};

/// Most vectors that one function can have (6.8.2.3: an 11-bit field that holds the number less one).
pub const MAX_VECTORS: u16 = 2048;

const ENTRY_LEN: usize = 16;
const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_MASK: u16 = 1 << 14;

#[derive(Clone, Copy)]
struct Entry {
    address: u64,
    data: u32,
    masked: bool,
}

struct State {
    entries: Vec<Entry>,
    pending: Vec<u64>,
    control: u16,
}

impl State {
    fn open(&self, vector: usize) -> bool {
        self.control & (CONTROL_ENABLE | CONTROL_MASK) == CONTROL_ENABLE
            && self.entries.get(vector).is_some_and(|entry| !entry.masked)
    }
}

/// The vectors of one function: table, pending bits, and the way to the interrupt chip.
///
/// Any thread may send. Lock order: this table, then whatever the interrupt chip locks. The table stays
/// locked while a message is handed to the chip, so that after a write that masks or moves a vector has
/// returned, no message of the old kind is under way; the chip never calls back.
pub struct MsiX {
    chip: Arc<dyn IrqChip>,
    state: Mutex<State>,
}

impl MsiX {
    /// `vectors` (1 to [`MAX_VECTORS`], else clamped) vectors, all masked, MSI-X disabled.
    #[must_use]
    pub fn new(chip: Arc<dyn IrqChip>, vectors: u16) -> MsiX {
        let vectors = usize::from(vectors.clamp(1, MAX_VECTORS));
        let entries = vec![Entry { address: 0, data: 0, masked: true }; vectors];
        let pending = vec![0; vectors.div_ceil(64)];
        MsiX { chip, state: Mutex::new(State { entries, pending, control: 0 }) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Number of vectors.
    #[must_use]
    pub fn vectors(&self) -> u16 {
        self.state().entries.len() as u16
    }

    /// Bytes of the table.
    #[must_use]
    pub fn table_len(&self) -> u64 {
        u64::from(self.vectors()) * ENTRY_LEN as u64
    }

    /// Bytes of the pending bit array.
    #[must_use]
    pub fn pending_len(&self) -> u64 {
        u64::from(self.vectors()).div_ceil(64) * 8
    }

    /// Capability ID, body and writable bits for [`ConfigSpace::add_capability`], for a table and a pending
    /// bit array at these offsets (multiples of 8) in BAR `bar`. Message control is the body's first word.
    ///
    /// [`ConfigSpace::add_capability`]: super::ConfigSpace::add_capability
    #[must_use]
    pub fn capability(&self, bar: u8, table: u32, pending: u32) -> (u8, [u8; 10], [u8; 10]) {
        let mut body = [0; 10];
        body[..2].copy_from_slice(&(self.vectors() - 1).to_le_bytes());
        body[2..6].copy_from_slice(&(table & !7 | u32::from(bar & 7)).to_le_bytes());
        body[6..].copy_from_slice(&(pending & !7 | u32::from(bar & 7)).to_le_bytes());
        let mut writable = [0; 10];
        writable[..2].copy_from_slice(&(CONTROL_ENABLE | CONTROL_MASK).to_le_bytes());
        (0x11, body, writable)
    }

    /// Takes over message control after software wrote it; pending vectors that it opens are sent.
    pub fn set_control(&self, control: u16) {
        let mut state = self.state();
        state.control = control;
        self.send_pending(&mut state);
    }

    /// Whether software has enabled MSI-X.
    #[must_use]
    pub fn enabled(&self) -> bool {
        self.state().control & CONTROL_ENABLE != 0
    }

    /// Sends `vector`, or marks it pending if it is masked. `None` if MSI-X is disabled or there is no such
    /// vector.
    pub fn signal(&self, vector: u16) -> Option<Delivery> {
        let vector = usize::from(vector);
        let mut state = self.state();
        let entry = *state.entries.get(vector)?;
        if state.control & CONTROL_ENABLE == 0 {
            return None;
        }
        if !state.open(vector) {
            state.pending[vector / 64] |= 1 << (vector % 64);
            return Some(Delivery::Masked);
        }
        Some(self.chip.signal_msi(MsiMessage { address: entry.address, data: entry.data }))
    }

    fn send_pending(&self, state: &mut State) {
        for word in 0..state.pending.len() {
            let mut left = state.pending[word];
            while left != 0 {
                let bit = left.trailing_zeros() as usize;
                left &= left - 1;
                if state.open(word * 64 + bit) {
                    state.pending[word] &= !(1 << bit);
                    let entry = state.entries[word * 64 + bit];
                    self.chip.signal_msi(MsiMessage { address: entry.address, data: entry.data });
                }
            }
        }
    }

    /// Reads the table; what lies outside reads as zeros.
    pub fn table_read(&self, offset: u64, data: &mut [u8]) {
        let state = self.state();
        for (n, byte) in data.iter_mut().enumerate() {
            let at = usize::try_from(offset).unwrap_or(usize::MAX).saturating_add(n);
            *byte = state.entries.get(at / ENTRY_LEN).map_or(0, |entry| match at % ENTRY_LEN {
                at @ 0..8 => entry.address.to_le_bytes()[at],
                at @ 8..12 => entry.data.to_le_bytes()[at - 8],
                12 => u8::from(entry.masked),
                _ => 0,
            });
        }
    }

    /// Writes the table: aligned accesses of 4 or 8 bytes (6.8.2); others are ignored. A vector that the
    /// write unmasks is sent if it is pending.
    pub fn table_write(&self, offset: u64, data: &[u8]) {
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len() as u64) {
            return;
        }
        let mut state = self.state();
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        let Some(entry) = state.entries.get_mut(at / ENTRY_LEN) else { return };
        for (n, word) in data.chunks_exact(4).enumerate() {
            let word = word.iter().rev().fold(0u32, |all, byte| all << 8 | u32::from(*byte));
            match at % ENTRY_LEN / 4 + n {
                0 => entry.address = entry.address >> 32 << 32 | u64::from(word & !3),
                1 => entry.address = u64::from(word) << 32 | entry.address & 0xffff_ffff,
                2 => entry.data = word,
                _ => entry.masked = word & 1 != 0,
            }
        }
        self.send_pending(&mut state);
    }

    /// Reads the pending bit array; what lies outside reads as zeros.
    pub fn pending_read(&self, offset: u64, data: &mut [u8]) {
        let state = self.state();
        for (n, byte) in data.iter_mut().enumerate() {
            let at = usize::try_from(offset).unwrap_or(usize::MAX).saturating_add(n);
            *byte = state.pending.get(at / 8).map_or(0, |word| word.to_le_bytes()[at % 8]);
        }
    }

    /// Back to power-on: disabled, all masked, nothing pending.
    pub fn reset(&self) {
        let mut state = self.state();
        state.control = 0;
        state.pending.fill(0);
        state.entries.fill(Entry { address: 0, data: 0, masked: true });
    }
}

impl std::fmt::Debug for MsiX {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = self.state();
        f.debug_struct("MsiX")
            .field("vectors", &state.entries.len())
            .field("control", &state.control)
            .field("pending", &state.pending)
            .finish_non_exhaustive()
    }
}
