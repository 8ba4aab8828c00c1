//! The map of memory that a kernel gets: E820 (ACPI specification, 15.1), multiboot and PVH alike.

use std::ops::Range;

use wardian_memory::GuestMemory;

/// End of conventional memory; the extended BIOS data area would begin here.
const EBDA: u64 = 0x9_fc00;
/// End of the area below the legacy video window.
const VIDEO: u64 = 0xa_0000;
/// Read-only area of firmware, where the ACPI tables lie.
const FIRMWARE: u64 = 0xf_0000;
const MEGABYTE: u64 = 0x10_0000;

/// What a range is for. The numbers are those of E820, multiboot and PVH.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MapKind {
    /// Usable RAM.
    Ram = 1,
    /// Not for the kernel's use.
    Reserved = 2,
}

/// One range of the map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapEntry {
    /// Physical addresses.
    pub range: Range<u64>,
    /// What they are for.
    pub kind: MapKind,
}

/// The map for `mem`: RAM with the usual holes below 1 MiB, and `reserved` ranges, ascending.
///
/// A reserved range that touches RAM is left out: RAM is never taken away here.
#[must_use]
pub fn memory_map(mem: &GuestMemory, reserved: &[Range<u64>]) -> Vec<MapEntry> {
    let mut map = vec![
        MapEntry { range: 0..EBDA, kind: MapKind::Ram },
        MapEntry { range: EBDA..VIDEO, kind: MapKind::Reserved },
        MapEntry { range: FIRMWARE..MEGABYTE, kind: MapKind::Reserved },
    ];
    let ram: Vec<Range<u64>> = mem.ranges();
    for r in &ram {
        let start = r.start.max(MEGABYTE);
        if start < r.end {
            map.push(MapEntry { range: start..r.end, kind: MapKind::Ram });
        }
    }
    for r in reserved {
        let touches = ram.iter().any(|m| r.start < m.end && m.start < r.end);
        if r.start < r.end && !touches {
            map.push(MapEntry { range: r.clone(), kind: MapKind::Reserved });
        }
    }
    map.sort_by_key(|e| e.range.start);
    map
}
