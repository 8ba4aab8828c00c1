use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use super::{AcpiConfig, AcpiError, AcpiTables, MAX_CPUS, build};
use crate::layout;

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
    bytes[at..at + len].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// The table at guest address `address`.
fn table(tables: &AcpiTables, address: u64) -> &[u8] {
    assert!(address.is_multiple_of(4));
    let bytes = &tables.tables[usize::try_from(address - tables.base).unwrap()..];
    &bytes[..number(bytes, 4, 4) as usize]
}

/// Walks from the root pointer as a guest does; every checksum on the way holds.
fn walk(tables: &AcpiTables) -> BTreeMap<String, Vec<u8>> {
    let rsdp = &tables.rsdp;
    assert_eq!((&rsdp[..8], rsdp.len(), rsdp[15]), (&b"RSD PTR "[..], 36, 2));
    assert_eq!((sum(&rsdp[..20]), sum(rsdp)), (0, 0));
    let xsdt = table(tables, number(rsdp, 24, 8));
    let mut addresses = vec![number(rsdp, 24, 8)];
    addresses.extend(xsdt[36..].chunks(8).map(|entry| number(entry, 0, 8)));
    let fadt = table(tables, addresses[1]);
    let (facs, dsdt) = (number(fadt, 36, 4), number(fadt, 140, 8));
    assert_eq!((number(fadt, 132, 8), number(fadt, 40, 4)), (0, dsdt));
    assert!(facs.is_multiple_of(64));
    assert_eq!(&table(tables, facs)[..4], b"FACS");
    addresses.push(dsdt);
    let mut found = BTreeMap::new();
    for address in addresses {
        let bytes = table(tables, address);
        let name = String::from_utf8(bytes[..4].to_vec()).unwrap();
        assert_eq!(sum(bytes), 0, "{name}");
        assert_eq!(&bytes[10..16], b"WARDIA", "{name}");
        found.insert(name, bytes.to_vec());
    }
    found
}

#[test]
fn a_guest_finds_every_table() {
    for cpus in [1, 2, 64, MAX_CPUS] {
        let tables = build(&AcpiConfig::new(cpus)).unwrap();
        assert!(tables.rsdp_base + tables.rsdp.len() as u64 <= tables.base);
        assert!(tables.base + tables.tables.len() as u64 <= layout::ACPI_END);
        let found = walk(&tables);
        let names: Vec<_> = found.keys().map(String::as_str).collect();
        assert_eq!(names, ["APIC", "DSDT", "FACP", "HPET", "MCFG", "XSDT"]);
        let lapics = found["APIC"][44..].chunks(8).take_while(|entry| entry[..2] == [0, 8]).count();
        assert_eq!(lapics as u32, cpus);
    }
}

#[test]
fn fixed_hardware_is_where_the_device_is() {
    let found = walk(&build(&AcpiConfig::new(2)).unwrap());
    let fadt = &found["FACP"];
    assert_eq!((fadt.len(), fadt[8], number(fadt, 46, 2)), (276, 6, 9));
    assert_eq!((number(fadt, 56, 4), number(fadt, 64, 4), number(fadt, 76, 4)), (0x600, 0x604, 0x608));
    assert_eq!((fadt[88], fadt[89], fadt[91], fadt[108]), (4, 2, 4, 0x32));
    assert_eq!(fadt[116..129], [1, 8, 0, 1, 0xf9, 0x0c, 0, 0, 0, 0, 0, 0, 0x06]);
    // X_PM1a_EVT_BLK, X_PM1a_CNT_BLK, X_PM_TMR_BLK
    for (at, old) in [(148, 56), (172, 64), (208, 76)] {
        assert_eq!((fadt[at], number(fadt, at + 4, 8)), (1, number(fadt, old, 4)));
    }
    let mcfg = &found["MCFG"];
    assert_eq!((number(mcfg, 44, 8), mcfg[54], mcfg[55]), (0xe000_0000, 0, 0));
    let hpet = &found["HPET"];
    assert_eq!((hpet.len(), number(hpet, 36, 4), number(hpet, 44, 8)), (56, 0x8086_a201, 0xfed0_0000));
    let tail = &found["APIC"][60..];
    assert_eq!(tail[..12], [1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
    assert_eq!(tail[12..22], [2, 10, 0, 0, 2, 0, 0, 0, 0, 0]);
    assert_eq!(tail[22..32], [2, 10, 0, 9, 9, 0, 0, 0, 0x0d, 0]);
    assert_eq!(tail[32..], [4, 6, 0xff, 0, 0, 1]);
}

#[test]
fn what_cannot_be_described_is_an_error() {
    for cpus in [0, MAX_CPUS + 1] {
        assert_eq!(build(&AcpiConfig::new(cpus)), Err(AcpiError::Cpus(cpus)));
    }
    for base in [0xd_ffc0, 0xf_0010, 0x10_0000, 0xf_ffc0] {
        let result = build(&AcpiConfig { cpus: 1, base });
        assert!(matches!(result, Err(AcpiError::Room { .. })), "{base:#x}: {result:?}");
    }
}

fn iasl(dir: &Path, arguments: &[&str]) -> Option<(bool, String)> {
    let output = Command::new("iasl").current_dir(dir).args(arguments).output().ok()?;
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    Some((output.status.success(), text))
}

#[test]
fn the_reference_compiler_reads_every_table() {
    let dir = std::env::temp_dir().join(format!("wardian-acpi-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    if iasl(&dir, &["-v"]).is_none() {
        println!("skipped, because iasl (Debian package acpica-tools) is not installed");
        std::fs::remove_dir_all(&dir).unwrap();
        return;
    }
    let found = walk(&build(&AcpiConfig::new(4)).unwrap());
    for (name, bytes) in &found {
        std::fs::write(dir.join(format!("{name}.dat")), bytes).unwrap();
        let (ok, text) = iasl(&dir, &["-d", &format!("{name}.dat")]).unwrap();
        assert!(ok && !text.contains("rror"), "{name}: {text}");
        let source = std::fs::read_to_string(dir.join(format!("{name}.dsl"))).unwrap();
        assert!(!source.to_lowercase().contains("incorrect checksum"), "{name}: {source}");
        // And back: the table has no errors as a source, and no warnings.
        let (ok, text) = iasl(&dir, &["-p", &format!("{name}-again"), &format!("{name}.dsl")]).unwrap();
        assert!(ok && text.contains("0 Errors, 0 Warnings"), "{name}: {text}");
    }
    let source = std::fs::read_to_string(dir.join("DSDT.dsl")).unwrap();
    for expected in [
        "PNP0A08",
        "PNP0501",
        "PNP0B00",
        "PNP0C02",
        "ACPI0007",
        "_PRT",
        "_OSC",
        "_S5",
        "VM_Gen_Counter",
        "_E05",
    ] {
        assert!(source.contains(expected), "{expected} is not in {source}");
    }
    std::fs::remove_dir_all(&dir).unwrap();
}
