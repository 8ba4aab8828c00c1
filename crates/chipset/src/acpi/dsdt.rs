//! The differentiated system description table: what is on the board, as AML.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Arg, CreateDWordField, Device, EISAName, Else, Equal, IO, If,
    Interrupt, Memory32Fixed, Method, Name, Notify, Or, Package, PackageBuilder, ResourceTemplate, Return,
    Scope, Uuid,
};
use acpi_tables::sdt::Sdt;

use super::{OEM_ID, OEM_REVISION, OEM_TABLE};
use crate::{genid, layout, pci, pm};

/// `_OSC` of a PCI Express root bridge (PCI Firmware Specification 3.3, 4.5).
const PCI_OSC: &str = "33DB4D5B-1FF7-401C-9657-7441C03DD766";

fn memory_window<T: Default>(min: T, max: T) -> AddressSpace<T> {
    AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, min, max, None)
}

fn io(range: &std::ops::Range<u64>) -> IO {
    IO::new(range.start as u16, range.start as u16, 1, (range.end - range.start) as u8)
}

/// `_PRT`: input of each pin of each device on the bus (6.2.13).
fn routing() -> PackageBuilder {
    let mut table = PackageBuilder::new();
    for device in 0..32u8 {
        for pin in 0..4u8 {
            let address = u32::from(device) << 16 | 0xffff;
            let gsi = pci::intx_gsi(device, pin + 1).0;
            table.add_element(&Package::new(vec![&address, &pin, &0u8, &gsi]));
        }
    }
    table
}

fn root_bridge(sink: &mut Vec<u8>) {
    let after_config = layout::PCI_CONFIG_PORTS.end as u16;
    let resources = ResourceTemplate::new(vec![
        &AddressSpace::new_bus_number(0u16, 0),
        &io(&layout::PCI_CONFIG_PORTS),
        &AddressSpace::<u16>::new_io(0, layout::PCI_CONFIG_PORTS.start as u16 - 1, None),
        &AddressSpace::<u16>::new_io(after_config, 0xffff, None),
        &memory_window(layout::PCI_MMIO32.start as u32, (layout::PCI_MMIO32.end - 1) as u32),
        &memory_window(layout::PCI_MMIO64.start, layout::PCI_MMIO64.end - 1),
    ])
    .bytes();
    // The guest may control whatever it asks for: there is no firmware that would mind.
    let osc = Method::new(
        "_OSC".into(),
        4,
        true,
        vec![
            &If::new(&Equal::new(&Arg(0), &Uuid::new(PCI_OSC)), vec![&Return::new(&Arg(3))]),
            &Else::new(vec![
                &CreateDWordField::new(&path("CDW1"), &Arg(3), &0u8),
                &Or::new(&path("CDW1"), &path("CDW1"), &4u8),
                &Return::new(&Arg(3)),
            ]),
        ],
    )
    .bytes();
    Device::new(
        "PCI0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_SEG".into(), &0u8),
            &Name::new("_BBN".into(), &0u8),
            &Name::new("_CCA".into(), &1u8),
            &Name::new("_CRS".into(), &Raw(resources)),
            &Name::new("_PRT".into(), &routing()),
            &Raw(osc),
        ],
    )
    .to_aml_bytes(sink);
}

/// A device of the ISA kind: `resources` as a template.
fn board_device(sink: &mut Vec<u8>, name: &str, hid: &str, resources: Vec<&dyn Aml>) {
    Device::new(
        name.into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new(hid)),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_CRS".into(), &ResourceTemplate::new(resources)),
        ],
    )
    .to_aml_bytes(sink);
}

/// The generation ID: its address as a package of two halves, by which every system finds the device.
fn generation_id(sink: &mut Vec<u8>) {
    let (low, high) = (layout::GENERATION_ID as u32, (layout::GENERATION_ID >> 32) as u32);
    Device::new(
        "VGEN".into(),
        vec![
            &Name::new("_HID".into(), &"WRDN0001"),
            &Name::new("_CID".into(), &"VM_Gen_Counter"),
            &Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &Name::new("ADDR".into(), &Package::new(vec![&low, &high])),
        ],
    )
    .to_aml_bytes(sink);
}

/// General-purpose event handlers (5.6.4.1): an edge, whose status bit is cleared before its method runs.
fn events(sink: &mut Vec<u8>) {
    let event = format!("_E{:02X}", genid::GENERATION_EVENT);
    let notify = Notify::new(&path("\\_SB_.VGEN"), &0x80u8).bytes();
    let method = Method::new(event.as_str().into(), 0, false, vec![&Raw(notify)]).bytes();
    Scope::new("\\_GPE".into(), vec![&Raw(method)]).to_aml_bytes(sink);
}

fn edge(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

/// The whole table for `cpus` processors.
pub(super) fn build(cpus: u32) -> Vec<u8> {
    let mut devices = Vec::new();
    root_bridge(&mut devices);
    let ecam_len = (layout::PCI_ECAM.end - layout::PCI_ECAM.start) as u32;
    board_device(
        &mut devices,
        "MBRD",
        "PNP0C02",
        vec![
            &Memory32Fixed::new(true, layout::PCI_ECAM.start as u32, ecam_len),
            &io(&layout::PM_PORTS),
            &io(&layout::DEBUG_CONSOLE),
            &io(&layout::DEBUG_EXIT),
        ],
    );
    board_device(&mut devices, "RTC_", "PNP0B00", vec![&io(&layout::RTC_PORTS), &edge(layout::GSI_RTC.0)]);
    board_device(&mut devices, "COM1", "PNP0501", vec![&io(&layout::COM1_PORTS), &edge(layout::GSI_COM1.0)]);
    generation_id(&mut devices);
    for cpu in 0..cpus {
        Device::new(
            format!("C{cpu:03X}").as_str().into(),
            vec![&Name::new("_HID".into(), &"ACPI0007"), &Name::new("_UID".into(), &cpu)],
        )
        .to_aml_bytes(&mut devices);
    }
    let mut body = Vec::new();
    Scope::new("\\_SB_".into(), vec![&Raw(devices)]).to_aml_bytes(&mut body);
    events(&mut body);
    let s5 = pm::SLEEP_TYPE_S5;
    Name::new("_S5_".into(), &Package::new(vec![&s5, &s5, &0u8, &0u8])).to_aml_bytes(&mut body);
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM_ID, OEM_TABLE, OEM_REVISION);
    dsdt.append_slice(&body);
    dsdt.as_slice().to_vec()
}

fn path(name: &str) -> acpi_tables::aml::Path {
    name.into()
}

/// AML that is made already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

trait Bytes {
    fn bytes(&self) -> Vec<u8>;
}

impl<T: Aml> Bytes for T {
    fn bytes(&self) -> Vec<u8> {
        super::bytes_of(self)
    }
}
