//! The machine's board: interrupt chips, timers, serial port, power, PCI root.
//!
//! *Comes in*: register accesses ([`wardian_bus::Device`]), deadlines ([`wardian_time::TimerQueue`]), interrupt
//! lines. *Goes out*: vectors to vCPUs, bytes to terminals, requests to power off or reset.
//!
//! **Architecture Invariant:** devices read time from `TimeBase` alone; a due tick becomes an interrupt in one
//! place, [`wardian_time::Tick`]. **Architecture Invariant:** every device locks itself, its lock is a leaf,
//! and it is not held across a call into another device.
//!
//! **API Boundary:** the public types of each module.
#![forbid(unsafe_code)]

pub mod acpi;
pub mod debug;
pub mod doorbell;
mod edge_ticks;
pub mod genid;
pub mod hpet;
pub mod i8042;
pub mod ioapic;
pub mod irqchip;
pub mod lapic;
pub mod layout;
pub mod pci;
pub mod pic;
pub mod pit;
pub mod pm;
pub mod power;
pub mod rtc;
pub mod serial;
#[cfg(test)]
mod testing;
mod wire;
