//! Page tables for tests: 4 KiB, 2 MiB and 1 GiB pages anywhere.

use crate::boot::{KIT_PML4, Table};
use crate::{Global, cpu};

pub const P: u64 = 1;
pub const W: u64 = 2;
pub const U: u64 = 4;
pub const A: u64 = 0x20;
pub const D: u64 = 0x40;
pub const LARGE: u64 = 0x80;
pub const G: u64 = 0x100;
pub const NX: u64 = 1 << 63;
pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Linear addresses from here on (the second PML4 entry) belong to tests.
pub const TEST: u64 = 0x80_0000_0000;

const POOL: usize = 64;
static TABLES: Global<[Table; POOL]> = Global::new([const { Table([0; 512]) }; POOL]);
static NEXT: Global<usize> = Global::new(0);

/// A zeroed page of the pool, by its physical (and linear) address.
pub fn fresh() -> u64 {
    let next = NEXT.get();
    assert!(next < POOL, "no page left");
    NEXT.set(next + 1);
    TABLES.addr() + next as u64 * 4096
}

/// Where the entry for `linear` lies at `level` (1: 4 KiB page, 2: 2 MiB, 3: 1 GiB); makes the tables above,
/// open to everybody.
pub fn entry(linear: u64, level: u32) -> *mut u64 {
    let mut table = KIT_PML4.addr();
    let mut at = 4;
    loop {
        let slot = (table + (linear >> (3 + 9 * at) & 511) * 8) as *mut u64;
        if at == level {
            return slot;
        }
        // SAFETY: the slot lies in one of the kit's tables.
        unsafe {
            let mut value = slot.read_volatile();
            if value & P == 0 {
                value = fresh() | P | W | U;
                slot.write_volatile(value);
            }
            assert!(value & LARGE == 0, "a large page is in the way");
            table = value & ADDRESS;
        }
        at -= 1;
    }
}

/// Writes the entry for `linear` at `level` and drops its translation.
pub fn map(linear: u64, level: u32, value: u64) {
    // SAFETY: `entry` returns a valid slot.
    unsafe { entry(linear, level).write_volatile(value) };
    cpu::invlpg(linear);
}

/// Reads the entry for `linear` at `level`.
pub fn look(linear: u64, level: u32) -> u64 {
    // SAFETY: as above.
    unsafe { entry(linear, level).read_volatile() }
}
