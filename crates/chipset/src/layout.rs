//! Where everything of the board is: physical addresses, ports and interrupt inputs.
//!
//! The ACPI tables state the same numbers to the guest; both come from here.

use std::ops::Range;

use wardian_irq::Gsi;

/// First byte above the memory that may lie below 4 GiB; what does not fit goes to [`HIGH_RAM_START`].
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// Where memory above the 32-bit hole begins.
pub const HIGH_RAM_START: u64 = 1 << 32;

/// 32-bit window for PCI BARs.
pub const PCI_MMIO32: Range<u64> = 0xc000_0000..0xe000_0000;
/// PCI Express enhanced configuration space (ECAM) of bus 0, the only one: Linux looks for devices on every bus that
/// this covers, one by one.
pub const PCI_ECAM: Range<u64> = 0xe000_0000..0xe010_0000;
/// 64-bit window for PCI BARs; needs a physical-address width of 40 bits.
pub const PCI_MMIO64: Range<u64> = (1 << 39)..(1 << 39) + (1 << 38);
/// IOAPIC.
pub const IOAPIC: Range<u64> = 0xfec0_0000..0xfec0_1000;
/// HPET.
pub const HPET: Range<u64> = 0xfed0_0000..0xfed0_0400;
/// Local APIC at reset.
pub const LAPIC: Range<u64> = 0xfee0_0000..0xfee0_1000;

/// Where the ACPI root pointer goes, followed by the other tables; up to [`ACPI_END`].
pub const ACPI_BASE: u64 = 0xf_0000;
/// End of the room for ACPI tables.
pub const ACPI_END: u64 = 0xf_f000;
/// The generation ID, alone in a page of what the memory map reserves for firmware.
pub const GENERATION_ID: u64 = ACPI_END;

/// CMOS index and data ports.
pub const RTC_PORTS: Range<u64> = 0x70..0x72;
/// Keyboard controller, data port.
pub const I8042_DATA: Range<u64> = 0x60..0x61;
/// Keyboard controller, command and status port.
pub const I8042_COMMAND: Range<u64> = 0x64..0x65;
/// System control port A (fast A20 and fast reset).
pub const PORT_92: Range<u64> = 0x92..0x93;
/// Power-on self-test codes.
pub const POST_PORT: Range<u64> = 0x80..0x81;
/// Debug console.
pub const DEBUG_CONSOLE: Range<u64> = 0xe9..0xea;
/// Debug exit.
pub const DEBUG_EXIT: Range<u64> = 0xf4..0xf8;
/// First serial port.
pub const COM1_PORTS: Range<u64> = 0x3f8..0x400;
/// Doorbell of the skew lab.
pub const DOORBELL: Range<u64> = 0x5c0..0x5c8;
/// ACPI power-management block.
pub const PM_PORTS: Range<u64> = 0x600..0x620;
/// PCI configuration mechanism #1, with the reset control register at CF9h.
pub const PCI_CONFIG_PORTS: Range<u64> = 0xcf8..0xd00;

/// The system timer (ISA interrupt 0, moved to input 2 by the MADT).
pub const GSI_TIMER: Gsi = Gsi(2);
/// First serial port.
pub const GSI_COM1: Gsi = Gsi(4);
/// CMOS clock.
pub const GSI_RTC: Gsi = Gsi(8);
/// ACPI system control interrupt, level-triggered, active high.
pub const GSI_SCI: Gsi = Gsi(9);
/// PCI INTx, swizzled over these four inputs; see [`crate::pci::intx_gsi`].
pub const GSI_INTX: [Gsi; 4] = [Gsi(16), Gsi(17), Gsi(18), Gsi(19)];
/// What HPET timers may be routed to.
pub const GSI_HPET: [Gsi; 4] = [Gsi(20), Gsi(21), Gsi(22), Gsi(23)];
