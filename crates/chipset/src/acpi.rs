//! The ACPI tables of the machine (ACPI Specification 6.5), as bytes for guest memory.
//!
//! RSDP, XSDT, FADT, FACS, MADT, MCFG, HPET and a DSDT with the PCI root bridge, the processors, the first
//! serial port, the CMOS clock and the board's own resources. Every number comes from [`crate::layout`]
//! and the devices themselves.

mod dsdt;
#[cfg(test)]
mod tests;

use acpi_tables::Aml;
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

use crate::{hpet, layout, pm, rtc};

const OEM_ID: [u8; 6] = *b"WARDIA";
const OEM_TABLE: [u8; 8] = *b"WARDIAN ";
const OEM_REVISION: u32 = 1;

/// Most processors that local APIC entries (8-bit IDs, FFh for all) can name.
pub const MAX_CPUS: u32 = 255;

/// Interrupt override and NMI flags: active high, level-triggered (5.2.12.5).
const ACTIVE_HIGH_LEVEL: u16 = 0b11_01;
/// FADT `IAPC_BOOT_ARCH`: legacy devices on the board; no VGA. The keyboard controller is not announced.
const BOOT_ARCH: u16 = 1 << 0 | 1 << 2;

/// What the tables describe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AcpiConfig {
    /// Number of processors; their APIC IDs are 0 to `cpus` - 1.
    pub cpus: u32,
    /// Guest address of the RSDP, a multiple of 64 below [`layout::ACPI_END`] and not below E0000h.
    pub base: u64,
}

impl AcpiConfig {
    /// Tables at [`layout::ACPI_BASE`].
    #[must_use]
    pub fn new(cpus: u32) -> AcpiConfig {
        AcpiConfig { cpus, base: layout::ACPI_BASE }
    }
}

/// The tables as bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcpiTables {
    /// Root pointer.
    pub rsdp: Vec<u8>,
    /// Where it goes.
    pub rsdp_base: u64,
    /// All other tables.
    pub tables: Vec<u8>,
    /// Where they go.
    pub base: u64,
}

impl AcpiTables {
    /// What to write where in guest memory.
    #[must_use]
    pub fn blobs(&self) -> [(u64, &[u8]); 2] {
        [(self.rsdp_base, &self.rsdp), (self.base, &self.tables)]
    }
}

/// Tables that cannot be built.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum AcpiError {
    /// No or too many processors.
    #[error("ACPI tables can describe 1 to {MAX_CPUS} processors, not {0}")]
    Cpus(u32),
    /// The tables do not fit in front of [`layout::ACPI_END`], or their base is no place for a root pointer.
    #[error("{len} bytes of ACPI tables do not fit at {base:#x}")]
    Room {
        /// Where they were to go.
        base: u64,
        /// Their length.
        len: usize,
    },
}

/// Tables one after the other, each at a multiple of 64.
struct Area {
    base: u64,
    bytes: Vec<u8>,
}

impl Area {
    fn place(&mut self, bytes: &[u8]) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(64), 0);
        let address = self.base + self.bytes.len() as u64;
        self.bytes.extend_from_slice(bytes);
        address
    }
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// Builds the tables.
///
/// # Errors
/// [`AcpiError`], for a number of processors or a place that ACPI cannot express.
pub fn build(config: &AcpiConfig) -> Result<AcpiTables, AcpiError> {
    if !(1..=MAX_CPUS).contains(&config.cpus) {
        return Err(AcpiError::Cpus(config.cpus));
    }
    let room = |len| AcpiError::Room { base: config.base, len };
    if !(0xe_0000..layout::ACPI_END).contains(&config.base) || !config.base.is_multiple_of(64) {
        return Err(room(0));
    }
    let mut area = Area { base: config.base + 64, bytes: Vec::new() };
    let facs = area.place(&bytes_of(&FACS::new()));
    let dsdt = area.place(&dsdt::build(config.cpus));
    let tables = [
        bytes_of(&fadt(facs as u32, dsdt)),
        madt(config.cpus).as_slice().to_vec(),
        bytes_of(&mcfg()),
        hpet_table().as_slice().to_vec(),
    ];
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE, OEM_REVISION);
    for table in tables {
        xsdt.add_entry(area.place(&table));
    }
    let xsdt = area.place(&bytes_of(&xsdt));
    if area.base + area.bytes.len() as u64 > layout::ACPI_END {
        return Err(room(area.bytes.len()));
    }
    Ok(AcpiTables {
        rsdp: bytes_of(&Rsdp::new(OEM_ID, xsdt)),
        rsdp_base: config.base,
        tables: area.bytes,
        base: area.base,
    })
}

fn ports(offset: u64, bytes: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, bytes * 8, 0, access, layout::PM_PORTS.start + offset)
}

/// Fixed hardware (5.2.9). The 32-bit fields and their X_ twins say the same.
fn fadt(facs: u32, dsdt: u64) -> impl Aml {
    let port = |offset: u64| u32::try_from(layout::PM_PORTS.start + offset).unwrap_or(0);
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE, OEM_REVISION)
        .firmware_ctrl_32(facs)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .gpe_info(port(pm::GPE0), 0, 4, 0, 0)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        // No sleep button, no RTC wake-up status; the power button is a fixed one.
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup);
    fadt.fadt_minor_version = 3;
    fadt.dsdt = (dsdt as u32).into();
    fadt.sci_int = (layout::GSI_SCI.0 as u16).into();
    fadt.pm1a_evt_blk = port(pm::PM1_EVENT).into();
    fadt.pm1_evt_len = 4;
    fadt.pm1a_cnt_blk = port(pm::PM1_CONTROL).into();
    fadt.pm1_cnt_len = 2;
    fadt.pm_tmr_blk = port(pm::PM_TIMER).into();
    fadt.pm_tmr_len = 4;
    // Beyond these the C2 and C3 states do not exist.
    fadt.p_lvl2_lat = 101.into();
    fadt.p_lvl3_lat = 1001.into();
    fadt.century = rtc::CENTURY;
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg =
        GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, layout::PCI_CONFIG_PORTS.start + 1);
    fadt.reset_value = 0x06;
    fadt.x_pm1a_evt_blk = ports(pm::PM1_EVENT, 4, AccessSize::WordAccess);
    fadt.x_pm1a_cnt_blk = ports(pm::PM1_CONTROL, 2, AccessSize::WordAccess);
    fadt.x_pm_tmr_blk = ports(pm::PM_TIMER, 4, AccessSize::DwordAccess);
    fadt.x_gpe0_blk = ports(pm::GPE0, 4, AccessSize::ByteAccess);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"Wardian\0").into();
    fadt.finalize()
}

/// Interrupt controllers (5.2.12). Built by hand: the crate has no overrides and no NMI entries.
fn madt(cpus: u32) -> Sdt {
    let mut body = Vec::new();
    body.extend((layout::LAPIC.start as u32).to_le_bytes());
    body.extend(1u32.to_le_bytes()); // PCAT_COMPAT: there is a pair of 8259s to be masked
    for cpu in 0..cpus as u8 {
        body.extend([0, 8, cpu, cpu, 1, 0, 0, 0]); // local APIC, enabled
    }
    body.extend([1, 12, 0, 0]); // IOAPIC, ID 0
    body.extend((layout::IOAPIC.start as u32).to_le_bytes());
    body.extend(0u32.to_le_bytes()); // from input 0
    let overrides = [(0u8, layout::GSI_TIMER.0, 0u16), (9, layout::GSI_SCI.0, ACTIVE_HIGH_LEVEL)];
    for (irq, gsi, flags) in overrides {
        body.extend([2, 10, 0, irq]);
        body.extend(gsi.to_le_bytes());
        body.extend(flags.to_le_bytes());
    }
    body.extend([4, 6, 0xff, 0, 0, 1]); // NMI at LINT1 of all processors
    let mut madt = Sdt::new(*b"APIC", 36, 5, OEM_ID, OEM_TABLE, OEM_REVISION);
    madt.append_slice(&body);
    madt
}

/// Enhanced configuration space (PCI Firmware Specification 3.3, 4.1.2).
fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE, OEM_REVISION);
    mcfg.add_ecam(layout::PCI_ECAM.start, 0, 0, 0);
    mcfg
}

/// HPET description (IA-PC HPET Specification 1.0a, 3.2.4).
fn hpet_table() -> Sdt {
    let mut body = Vec::new();
    body.extend(hpet::CAPABILITIES.to_le_bytes());
    body.extend([0, 64, 0, 0]); // in memory, 64 bits
    body.extend(layout::HPET.start.to_le_bytes());
    body.push(0); // the first and only one
    body.extend((hpet::MIN_PERIOD_TICKS as u16).to_le_bytes());
    body.push(0);
    let mut table = Sdt::new(*b"HPET", 36, 1, OEM_ID, OEM_TABLE, OEM_REVISION);
    table.append_slice(&body);
    table
}
