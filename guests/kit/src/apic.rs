//! The local APIC through its memory page (Intel SDM vol. 3A, chapter 12) and the legacy PICs.

use crate::io::{self, in8, out8};

pub const BASE: u64 = 0xfee0_0000;
pub const ID: u64 = 0x20;
pub const VERSION: u64 = 0x30;
pub const TPR: u64 = 0x80;
pub const EOI: u64 = 0xb0;
pub const LDR: u64 = 0xd0;
pub const DFR: u64 = 0xe0;
pub const SVR: u64 = 0xf0;
pub const ISR: u64 = 0x100;
pub const IRR: u64 = 0x200;
pub const ESR: u64 = 0x280;
pub const ICR: u64 = 0x300;
pub const ICR_HIGH: u64 = 0x310;
pub const LVT_TIMER: u64 = 0x320;
pub const LVT_LINT0: u64 = 0x350;
pub const TIMER_INITIAL: u64 = 0x380;
pub const TIMER_CURRENT: u64 = 0x390;
pub const TIMER_DIVIDE: u64 = 0x3e0;

pub fn read(register: u64) -> u32 {
    io::read32(BASE + register)
}

pub fn write(register: u64, value: u32) {
    io::write32(BASE + register, value);
}

/// Turns the local APIC on (spurious vector FFh) and masks both PICs.
pub fn enable() {
    mask_pics();
    write(SVR, 0x1ff);
    write(TPR, 0);
}

pub fn mask_pics() {
    out8(0x21, 0xff);
    out8(0xa1, 0xff);
}

/// Sets both PICs up with vectors 20h and 28h, all masked but `open` (IRQ bits).
pub fn set_up_pics(open: u16) {
    for (port, base, wire) in [(0x20u16, 0x20u8, 4u8), (0xa0, 0x28, 2)] {
        out8(port, 0x11);
        out8(port + 1, base);
        out8(port + 1, wire);
        out8(port + 1, 1);
    }
    out8(0x21, !open as u8);
    out8(0xa1, (!open >> 8) as u8);
    let _ = in8(0x21);
}

pub fn eoi() {
    write(EOI, 0);
}

pub fn id() -> u32 {
    read(ID) >> 24
}

/// Sends an interrupt command and waits until it is accepted.
pub fn send(target: u32, command: u32) {
    write(ICR_HIGH, target << 24);
    write(ICR, command);
    while read(ICR) & 1 << 12 != 0 {}
}
