use std::path::{Path, PathBuf};

use wardian_cpu::CpuState;
use wardian_memory::{Gpa, GuestMemory};

use super::*;

const MIB: u64 = 1 << 20;

fn put(bytes: &mut Vec<u8>, at: usize, data: &[u8]) {
    if bytes.len() < at + data.len() {
        bytes.resize(at + data.len(), 0);
    }
    bytes[at..at + data.len()].copy_from_slice(data);
}

/// One setup sector, 4096 bytes of code that count up, preferred at 16 MiB.
fn bzimage() -> Vec<u8> {
    let mut b = vec![0u8; 1024];
    put(&mut b, 0, b"MZ");
    put(&mut b, 0x1f1, &[1]);
    put(&mut b, 0x1f4, &256u32.to_le_bytes());
    put(&mut b, 0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(&mut b, 0x202, b"HdrS");
    put(&mut b, 0x206, &0x20fu16.to_le_bytes());
    put(&mut b, 0x211, &[1]);
    put(&mut b, 0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(&mut b, 0x236, &1u16.to_le_bytes());
    put(&mut b, 0x238, &255u32.to_le_bytes());
    put(&mut b, 0x258, &(16 * MIB).to_le_bytes());
    put(&mut b, 0x260, &(2 * MIB as u32).to_le_bytes());
    b.extend((0..4096u32).map(|i| i as u8));
    b
}

/// A 64-bit ELF with one segment of 64 file and 8192 memory bytes at 1 MiB, and a note.
fn elf64(note: &[u8]) -> Vec<u8> {
    let mut b = vec![0u8; 0x200];
    put(&mut b, 0, b"\x7fELF\x02\x01\x01");
    put(&mut b, 16, &2u16.to_le_bytes());
    put(&mut b, 18, &62u16.to_le_bytes());
    put(&mut b, 24, &0xffff_ffff_8010_0000u64.to_le_bytes());
    put(&mut b, 32, &64u64.to_le_bytes());
    put(&mut b, 54, &56u16.to_le_bytes());
    put(&mut b, 56, &2u16.to_le_bytes());
    let mut segment = |at: usize, kind: u32, offset: u64, paddr: u64, file: u64, mem: u64| {
        put(&mut b, at, &kind.to_le_bytes());
        for (i, word) in [offset, 0xffff_ffff_8000_0000 + paddr, paddr, file, mem, 4].iter().enumerate() {
            put(&mut b, at + 8 + i * 8, &word.to_le_bytes());
        }
    };
    segment(64, 1, 0x200, MIB, 64, 8192);
    segment(120, 4, 0x300, 0, note.len() as u64, note.len() as u64);
    put(&mut b, 0x200, &[0x90; 64]);
    put(&mut b, 0x300, note);
    b
}

fn pvh() -> Vec<u8> {
    let mut note = Vec::new();
    for word in [4u32, 4, 6] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0....");
    for word in [4u32, 8, 18] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend((MIB + 16).to_le_bytes());
    elf64(&note)
}

fn multiboot_header(flags: u32, addresses: &[u32]) -> Vec<u8> {
    let mut h = Vec::new();
    for word in [0x1bad_b002, flags, 0u32.wrapping_sub(0x1bad_b002).wrapping_sub(flags)] {
        h.extend(word.to_le_bytes());
    }
    h.extend(addresses.iter().flat_map(|a| a.to_le_bytes()));
    h
}

/// Flat image: 16 bytes ahead of the header, 100 bytes in all, BSS up to 2 MiB + 8192.
fn multiboot_flat() -> Vec<u8> {
    let at = 2 * MIB as u32;
    let mut b = vec![0xaau8; 16];
    b.extend(multiboot_header(1 << 16 | 3, &[at + 16, at, at + 100, at + 8192, at + 48]));
    b.resize(200, 0xbb);
    b
}

fn multiboot_elf() -> Vec<u8> {
    let mut b = elf64(&[]);
    put(&mut b, 0x210, &multiboot_header(3, &[]));
    b
}

struct Bench {
    dir: tempfile::TempDir,
    mem: GuestMemory,
}

impl Bench {
    fn new(mib: u64) -> Bench {
        Bench {
            dir: tempfile::tempdir().expect("temporary folder"),
            mem: GuestMemory::new(mib * MIB).expect("memory"),
        }
    }
    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, bytes).expect("write");
        path
    }
    fn request(&self, kernel: &[u8]) -> BootRequest {
        BootRequest { kernel: self.file("kernel", kernel), ..BootRequest::default() }
    }
    fn load(&self, request: &BootRequest) -> Result<CpuState, BootError> {
        load(&self.mem, request)
    }
    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        self.mem.read(Gpa(at), &mut out).expect("read");
        out
    }
    fn u32(&self, at: u64) -> u32 {
        u32::from_le_bytes(self.bytes(at, 4).try_into().expect("4"))
    }
    fn u64(&self, at: u64) -> u64 {
        u64::from_le_bytes(self.bytes(at, 8).try_into().expect("8"))
    }
    fn text(&self, at: u64) -> String {
        let bytes = self.bytes(at, 256);
        let end = bytes.iter().position(|b| *b == 0).expect("NUL");
        String::from_utf8(bytes[..end].to_vec()).expect("text")
    }
}

#[test]
fn bzimage_by_the_64_bit_protocol() {
    let b = Bench::new(64);
    let mut r = b.request(&bzimage());
    r.cmdline = "console=ttyS0".into();
    r.acpi_rsdp = Some(0xf_0000);
    r.reserved = vec![0xe000_0000..0xf000_0000, 0..4096];
    r.initrd = Some(b.file("initrd", &[0x11; 5000]));
    let s = b.load(&r).expect("loads");
    let zero = s.gpr[6];
    assert_eq!(s.rip, 16 * MIB + 0x200);
    assert_eq!(b.bytes(16 * MIB, 4096), (0..4096u32).map(|i| i as u8).collect::<Vec<_>>());
    assert_eq!(b.bytes(zero + 0x202, 4), b"HdrS");
    assert_eq!(b.bytes(zero + 0x210, 1), [0xff]);
    assert_eq!(b.text(u64::from(b.u32(zero + 0x228))), "console=ttyS0");
    assert_eq!(b.u64(zero + 0x70), 0xf_0000);
    let (at, len) = (b.u32(zero + 0x218), b.u32(zero + 0x21c));
    assert_eq!((u64::from(at), len), (64 * MIB - 8192, 5000));
    assert_eq!(b.bytes(u64::from(at), 5000), [0x11; 5000]);
    // The map: ascending, disjoint, RAM only where there is RAM.
    let count = u64::from(b.bytes(zero + 0x1e8, 1)[0]);
    let map: Vec<(u64, u64, u32)> =
        (0..count).map(|i| zero + 0x2d0 + i * 20).map(|e| (b.u64(e), b.u64(e + 8), b.u32(e + 16))).collect();
    assert_eq!(
        map,
        [
            (0, 0x9_fc00, 1),
            (0x9_fc00, 0x400, 2),
            (0xf_0000, 0x1_0000, 2),
            (MIB, 63 * MIB, 1),
            (0xe000_0000, 0x1000_0000, 2),
        ]
    );
    // Long mode with an identity map of 4 GiB.
    assert_eq!((s.cr0 & 0x8000_0001, s.cr4 & 0x20, s.efer), (0x8000_0001, 0x20, 0x500));
    for linear in [0, 16 * MIB, 0x7fff_f123, 0xffff_ffff] {
        let pml4 = b.u64(s.cr3);
        let pdpt = b.u64((pml4 & !0xfff) + (linear >> 30) * 8);
        let pd = b.u64((pdpt & !0xfff) + (linear >> 21 & 511) * 8);
        assert_eq!((pml4 & 1, pdpt & 1, pd & 0x81), (1, 1, 0x81));
        assert_eq!((pd & !0x1f_ffff) + (linear & 0x1f_ffff), linear);
    }
    let cs = s.segments[CpuState::CS];
    assert!(cs.long() && cs.selector == 0x10 && s.segments[CpuState::SS].selector == 0x18);
    // The descriptors in memory are those in the registers.
    assert_eq!(b.u64(s.gdtr.base + 0x10), 0x00af_9b00_0000_ffff);
    assert_eq!(b.u64(s.gdtr.base + 0x18), 0x00cf_9300_0000_ffff);
    assert_eq!(s.rflags, 2);
}

#[test]
fn kernel_size_may_be_rounded_up() {
    let b = Bench::new(64);
    let mut k = bzimage();
    k.truncate(k.len() - 15);
    assert!(b.load(&b.request(&k)).is_ok());
    k.truncate(k.len() - 1);
    assert!(matches!(b.load(&b.request(&k)), Err(BootError::Truncated { .. })));
}

#[test]
fn elf_by_its_pvh_note() {
    let b = Bench::new(64);
    b.mem.write(Gpa(MIB + 64), &[0xcc; 8192]).expect("write");
    let mut r = b.request(&pvh());
    r.cmdline = "quiet".into();
    r.initrd = Some(b.file("initrd", &[7; 10]));
    r.modules = vec![(b.file("more", &[8; 20]), "second".into())];
    r.acpi_rsdp = Some(0xf_1230);
    let s = b.load(&r).expect("loads");
    let info = s.gpr[3];
    assert_eq!(s.rip, MIB + 16);
    assert_eq!((s.cr0 & 0x8000_0001, s.efer, s.rflags), (1, 0, 2));
    assert!(s.segments[CpuState::CS].big() && !s.segments[CpuState::CS].long());
    assert_eq!((b.u32(info), b.u32(info + 4), b.u32(info + 12)), (0x336e_c578, 1, 2));
    assert_eq!(b.text(b.u64(info + 24)), "quiet");
    assert_eq!(b.u64(info + 32), 0xf_1230);
    let mods = b.u64(info + 16);
    assert_eq!(b.bytes(b.u64(mods), b.u64(mods + 8) as usize), [7; 10]);
    assert_eq!(b.bytes(b.u64(mods + 32), b.u64(mods + 40) as usize), [8; 20]);
    assert_eq!(b.text(b.u64(mods + 48)), "second");
    let map = b.u64(info + 40);
    assert_eq!(b.u32(info + 48), 4);
    assert_eq!((b.u64(map + 3 * 24), b.u32(map + 3 * 24 + 16)), (MIB, 1));
    assert_eq!(b.bytes(MIB, 64), [0x90; 64]);
    // BSS is cleared and nothing behind it.
    assert_eq!(b.bytes(MIB + 64, 8128), [0; 8128]);
    assert_eq!(b.bytes(MIB + 8192, 64), [0xcc; 64]);
}

#[test]
fn multiboot_with_modules() {
    for (kernel, at, door) in [(multiboot_flat(), 2 * MIB, 2 * MIB + 48), (multiboot_elf(), MIB, MIB)] {
        let b = Bench::new(8);
        let mut r = b.request(&kernel);
        r.cmdline = "a b".into();
        r.initrd = Some(b.file("one", &[1; 4097]));
        r.modules = vec![(b.file("two", &[2; 5]), "x y".into())];
        let s = b.load(&r).expect("loads");
        let info = s.gpr[3];
        assert_eq!((s.rip, s.gpr[0]), (door, 0x2bad_b002));
        assert_eq!(b.u32(info), 0b10_0100_1101);
        assert_eq!((b.u32(info + 4), b.u32(info + 8)), (639, 7 * 1024));
        assert_eq!(b.text(u64::from(b.u32(info + 16))), format!("{} a b", r.kernel.display()));
        assert_eq!(b.u32(info + 20), 2);
        let mods = u64::from(b.u32(info + 24));
        assert_eq!((u64::from(b.u32(mods)), b.u32(mods + 4) - b.u32(mods)), (at + 8192, 4097));
        assert_eq!(u64::from(b.u32(mods + 16)), at + 8192 + 8192);
        assert_eq!(b.bytes(at + 16384, 6), [2, 2, 2, 2, 2, 0]);
        assert!(b.text(u64::from(b.u32(mods + 24))).ends_with("two x y"));
        let (len, map) = (b.u32(info + 44), u64::from(b.u32(info + 48)));
        assert_eq!(
            (len, b.u32(map), b.u64(map + 4), b.u64(map + 12), b.u32(map + 20)),
            (96, 20, 0, 0x9_fc00, 1)
        );
    }
    // The flat image is cut where its header says.
    let b = Bench::new(8);
    b.load(&b.request(&multiboot_flat())).expect("loads");
    assert_eq!(b.bytes(2 * MIB + 99, 2), [0xbb, 0]);
}

fn edited(mut bytes: Vec<u8>, at: usize, data: &[u8]) -> Vec<u8> {
    put(&mut bytes, at, data);
    bytes
}

#[test]
fn each_fault_has_its_name() {
    let b = Bench::new(64);
    let fails = |kernel: &[u8], pattern: &str| {
        let error = b.load(&b.request(kernel)).expect_err(pattern).to_string();
        assert!(error.contains(pattern), "{error:?} does not say {pattern:?}");
    };
    fails(b"", "is truncated");
    fails(b"MZ short", "is truncated");
    fails(&bzimage()[..0x220], "is truncated");
    fails(&bzimage()[..2000], "is truncated: The kernel");
    fails(&[0u8; 5000], "is no kernel");
    fails(b"#!/bin/sh\n", "is no kernel");
    fails(&edited(bzimage(), 0x38, b"ARM\x64"), "for AArch64");
    fails(&edited(bzimage(), 0x236, &[0, 0]), "no 64-bit entry");
    fails(&edited(bzimage(), 0x206, &[3, 2]), "boot protocol 2.03");
    fails(&edited(bzimage(), 0x211, &[0]), "below 1 MiB");
    fails(&edited(bzimage(), 0x1f4, &[0; 4]), "is garbled: 0 bytes of kernel");
    fails(&edited(bzimage(), 0x258, &u64::MAX.to_le_bytes()), "preferred address");
    fails(&edited(bzimage(), 0x258, &[0; 8]), "below 1 MiB");
    fails(&edited(pvh(), 18, &183u16.to_le_bytes()), "for AArch64");
    fails(&edited(edited(pvh(), 5, &[2]), 18, &[0, 22]), "for S/390");
    fails(&edited(pvh(), 4, &[9]), "ELF class 9");
    fails(&edited(pvh(), 56, &[0xff, 0xff]), "65535 program headers");
    fails(&edited(pvh(), 32, &u64::MAX.to_le_bytes()), "is truncated: The table");
    fails(&edited(pvh(), 64 + 32, &(1u64 << 40).to_le_bytes()), "is truncated: A segment");
    fails(&edited(pvh(), 64 + 40, &[1, 0, 0, 0, 0, 0, 0, 0]), "a segment of");
    fails(&edited(pvh(), 64 + 24, &[0; 8]), "below 1 MiB");
    fails(&edited(pvh(), 64 + 24, &(64 * MIB).to_le_bytes()), "too small");
    fails(&pvh()[..0x220], "is truncated");
    fails(&elf64(&[]), "neither a PVH note nor");
    fails(
        &edited(multiboot_flat(), 16, &multiboot_header(1 << 16 | 8, &[])),
        "demands multiboot features 0x8",
    );
    fails(&multiboot_flat()[..60], "is truncated: The multiboot image");
    fails(&edited(multiboot_flat(), 28, &[0; 4]), "multiboot load address");
    fails(&multiboot_header(3, &[]), "no addresses and it is no ELF");

    let missing = BootRequest { kernel: b.dir.path().join("nothing"), ..BootRequest::default() };
    assert!(matches!(b.load(&missing), Err(BootError::Read { path, .. }) if path.ends_with("nothing")));
    for path in [b.dir.path(), Path::new("/dev/zero")] {
        let odd = BootRequest { kernel: path.to_path_buf(), ..BootRequest::default() };
        assert!(matches!(b.load(&odd), Err(BootError::Read { .. })));
    }
}

#[test]
fn sizes_are_held_against_memory() {
    let b = Bench::new(32);
    for kernel in [bzimage(), pvh(), multiboot_flat()] {
        let mut r = b.request(&kernel);
        // A sparse file, larger than memory.
        let initrd = b.file("initrd", &[]);
        std::fs::File::create(&initrd).and_then(|f| f.set_len(1 << 40)).expect("sparse file");
        r.initrd = Some(initrd.clone());
        assert!(matches!(b.load(&r), Err(BootError::InitrdTooLarge { size: 0x100_0000_0000, .. })));
        r.initrd = Some(b.dir.path().join("none"));
        assert!(matches!(b.load(&r), Err(BootError::Read { .. })));
        r.initrd = None;
        r.cmdline = "x".repeat(4096);
        assert!(matches!(b.load(&r), Err(BootError::CommandLineTooLong { len: 4096.., .. })));
        r.cmdline = "a\0b".into();
        assert!(matches!(b.load(&r), Err(BootError::CommandLineNul)));
    }
    // Exactly what a bzImage takes, and one more.
    let mut r = b.request(&bzimage());
    r.cmdline = "x".repeat(255);
    assert!(b.load(&r).is_ok());
    r.cmdline.push('x');
    assert!(matches!(b.load(&r), Err(BootError::CommandLineTooLong { len: 256, max: 255 })));
    // The largest initial RAM disk that fits, and one more byte.
    r.cmdline.clear();
    let initrd = b.file("initrd", &[]);
    std::fs::File::create(&initrd).and_then(|f| f.set_len(14 * MIB)).expect("sparse file");
    r.initrd = Some(initrd.clone());
    assert!(b.load(&r).is_ok());
    std::fs::File::create(&initrd).and_then(|f| f.set_len(14 * MIB + 1)).expect("sparse file");
    assert!(matches!(b.load(&r), Err(BootError::InitrdTooLarge { room: 0xe0_0000, .. })));

    let small = Bench::new(16);
    assert!(matches!(
        small.load(&small.request(&bzimage())),
        Err(BootError::MemoryTooSmall { need: 0x120_0000, have: 0x100_0000 })
    ));
    assert!(matches!(
        Bench::new(1).load(&small.request(&multiboot_flat())),
        Err(BootError::MemoryTooSmall { .. })
    ));
    let mut many = b.request(&multiboot_flat());
    let module = b.file("module", &[0]);
    many.modules = vec![(module, "y".repeat(4000)); 200];
    assert!(matches!(b.load(&many), Err(BootError::TooMuchInformation { .. })));
}

#[test]
fn the_map_has_high_memory() {
    let mem = GuestMemory::new(5 << 30).expect("memory");
    let map = memory_map(&mem, &[(0xe000_0000..0xf000_0000), (0x1_0000_0000..0x1_0000_1000)]);
    let ram: u64 = map.iter().filter(|e| e.kind == MapKind::Ram).map(|e| e.range.end - e.range.start).sum();
    assert_eq!(ram, (5 << 30) - MIB + 0x9_fc00);
    assert_eq!(map.last().map(|e| e.range.clone()), Some(0x1_0000_0000..0x1_8000_0000));
    assert!(map.windows(2).all(|w| w[0].range.end <= w[1].range.start));
}

/// Garbled and cut files: an error or a kernel that starts in RAM, never a panic.
#[test]
fn garbled_files_are_errors() {
    let b = Bench::new(32);
    let initrd = b.file("initrd", &[1; 100]);
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let (mut loaded, mut refused) = (0, 0);
    for original in [bzimage(), pvh(), multiboot_flat(), multiboot_elf()] {
        // Most of each file is payload; the headers are what to garble.
        let headers = original.len().min(0x340);
        for _ in 0..4000 {
            let mut bytes = original.clone();
            for _ in 0..1 + random() % 4 {
                let at = random() as usize % headers;
                match random() % 3 {
                    0 => bytes[at] = random() as u8,
                    1 => bytes[at] ^= 1 << (random() % 8),
                    _ => {
                        let extreme = [0, 0xff, 0x7f, 0x80][random() as usize % 4];
                        let end = (at + [2, 4, 8][random() as usize % 3]).min(bytes.len());
                        bytes[at..end].fill(extreme);
                    }
                }
            }
            if random().is_multiple_of(8) {
                bytes.truncate(random() as usize % (original.len() + 1));
            }
            let image = Image { path: "garbled".into(), bytes };
            let request = BootRequest { initrd: Some(initrd.clone()), ..BootRequest::default() };
            match load_image(&b.mem, &request, &image) {
                Ok(state) => {
                    assert!(b.mem.contains(Gpa(state.rip), 1), "entry {:#x}", state.rip);
                    loaded += 1;
                }
                Err(BootError::Memory(e)) => panic!("a write beside RAM was tried: {e}"),
                Err(_) => refused += 1,
            }
        }
    }
    assert!(loaded > 1000 && refused > 1000, "{loaded} loaded, {refused} refused");
}
