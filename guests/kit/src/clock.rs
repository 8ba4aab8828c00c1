//! A clock to wait by: the PIT's counter 2, whose frequency is known (1.193182 MHz).

use crate::io::{in8, out8};

pub const PIT_HZ: u64 = 1_193_182;

/// Waits for `ticks` of the PIT (below 65536) on counter 2.
pub fn wait_ticks(ticks: u16) {
    // Gate on, speaker off; mode 0 raises OUT2 (bit 5) at the end.
    out8(0x61, in8(0x61) & !2 | 1);
    out8(0x43, 0xb0);
    out8(0x42, ticks as u8);
    out8(0x42, (ticks >> 8) as u8);
    while in8(0x61) & 0x20 == 0 {}
}

/// Waits for at least `ms` milliseconds, fifty at a time.
pub fn wait_ms(ms: u64) {
    let mut left = ms;
    while left > 0 {
        let step = left.min(50);
        wait_ticks((PIT_HZ * step / 1000) as u16);
        left -= step;
    }
}
