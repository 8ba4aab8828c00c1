use wardian_cpu::Exit;
use wardian_cpu::bits::rflags::{ARITH, CF, DF, ZF};

use crate::core::Core;
use crate::sys::legacy::harness::{
    CODE, DEVICE, complete, core16, core32, core64, exception, once, page_fault, peek, poke, protect, run,
};
use crate::sys::legacy::operand::{RAX, RCX, RDI, RSI};

fn set(core: &mut Core, count: u64, from: u64, to: u64) {
    core.set_gpr(RCX, count);
    core.set_gpr(RSI, from);
    core.set_gpr(RDI, to);
}

fn registers(core: &Core) -> [u64; 3] {
    [core.gpr(RCX), core.gpr(RSI), core.gpr(RDI)]
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n * 7 + n / 256) as u8).collect()
}

const REP_MOVSB: &[u8] = &[0xf3, 0xa4];
const REP_MOVSD: &[u8] = &[0xf3, 0xa5];
const REP_MOVSQ: &[u8] = &[0xf3, 0x48, 0xa5];
const REP_STOSQ: &[u8] = &[0xf3, 0x48, 0xab];
const REP_LODSW: &[u8] = &[0xf3, 0x66, 0xad];
const REPE_CMPSB: &[u8] = &[0xf3, 0xa6];
const REPNE_SCASB: &[u8] = &[0xf2, 0xae];
const REPE_SCASD: &[u8] = &[0xf3, 0xaf];

#[test]
fn moves_across_pages_at_any_offset() {
    for (from, to, count, insn, size) in [
        (0x2_0123u64, 0x4_0fff, 20_000u64, REP_MOVSB, 1u64),
        (0x2_0001, 0x4_0003, 5_001, REP_MOVSQ, 8),
        (0x2_0ffe, 0x4_0ffd, 3_000, REP_MOVSD, 4),
    ] {
        let mut core = core64();
        let data = pattern((count * size) as usize);
        poke(&core, from, &data);
        set(&mut core, count, from, to);
        run(&mut core, insn).expect("moves");
        assert_eq!(registers(&core), [0, from + count * size, to + count * size]);
        assert!(peek(&core, to, data.len()) == data, "{insn:x?}");
        assert_eq!(peek(&core, to + count * size, 1), [0]);
    }
}

#[test]
fn overlap_smears_upwards_and_not_downwards() {
    let mut core = core64();
    poke(&core, 0x2_0000, &[1, 2, 3]);
    set(&mut core, 10_000, 0x2_0000, 0x2_0003);
    run(&mut core, REP_MOVSB).expect("moves");
    let smeared: Vec<u8> = (0..10_003).map(|n| (n % 3) as u8 + 1).collect();
    assert!(peek(&core, 0x2_0000, 10_003) == smeared);

    for size in [1u64, 8] {
        let mut core = core64();
        let data = pattern(16_000);
        poke(&core, 0x2_0005, &data);
        core.set_rflags(DF | 2);
        let last = 16_000 - size;
        set(&mut core, 16_000 / size, 0x2_0005 + last, 0x2_0105 + last);
        run(&mut core, if size == 1 { REP_MOVSB } else { REP_MOVSQ }).expect("moves");
        assert!(peek(&core, 0x2_0105, 16_000) == data, "size {size}");
        let end = [0, 0x2_0005u64.wrapping_sub(size), 0x2_0105 - size];
        assert_eq!(registers(&core), end);
        assert_eq!(peek(&core, 0x2_0005, 0x100), data[..0x100]);
    }
}

#[test]
fn a_fault_in_the_middle_leaves_exact_registers() {
    // Destination read-only from 0x4_2000 on; the element that straddles it is not written at all.
    let mut core = core64();
    poke(&core, 0x2_0000, &pattern(0x5000));
    protect(&mut core, 0x4_2000, 5);
    set(&mut core, 0x800, 0x2_0000, 0x4_0004);
    assert_eq!(run(&mut core, REP_MOVSQ), page_fault(7, 0x4_2000));
    assert_eq!(registers(&core), [0x800 - 0x3ff, 0x2_1ff8, 0x4_1ffc]);
    assert_eq!(core.rip(), CODE);
    assert_eq!(peek(&core, 0x4_1ffc, 8), [0; 8]);
    protect(&mut core, 0x4_2000, 7);
    run(&mut core, REP_MOVSQ).expect("goes on");
    assert!(peek(&core, 0x4_0004, 0x4000) == pattern(0x4000));

    // Source not present, downwards: the fault is at the element's own address.
    let mut core = core64();
    protect(&mut core, 0x2_0000, 0);
    core.set_rflags(DF | 2);
    set(&mut core, 100, 0x2_1008, 0x4_0800);
    assert_eq!(run(&mut core, REP_MOVSD), page_fault(4, 0x2_0ffc));
    assert_eq!(registers(&core), [97, 0x2_0ffc, 0x4_07f4]);

    // Both sides missing: the source is read first.
    let mut core = core64();
    protect(&mut core, 0x2_0000, 0);
    protect(&mut core, 0x4_0000, 0);
    set(&mut core, 1, 0x2_0010, 0x4_0010);
    assert_eq!(run(&mut core, REP_MOVSB), page_fault(4, 0x2_0010));
    set(&mut core, 1, 0x3_0010, 0x4_0010);
    assert_eq!(run(&mut core, REP_MOVSB), page_fault(6, 0x4_0010));
}

#[test]
fn a_compare_that_faults_keeps_the_flags_of_the_element_before() {
    let mut core = core64();
    protect(&mut core, 0x2_1000, 0);
    poke(&core, 0x2_0ffe, &[5, 5]);
    poke(&core, 0x4_0000, &[5, 5, 5]);
    core.set_rflags(CF | 2);
    set(&mut core, 9, 0x2_0ffe, 0x4_0000);
    assert_eq!(run(&mut core, REPE_CMPSB), page_fault(4, 0x2_1000));
    assert_eq!(registers(&core), [7, 0x2_1000, 0x4_0002]);
    assert_eq!(core.rflags() & (ZF | CF), ZF);
}

#[test]
fn scans_and_compares_stop_with_the_flags_of_the_last_element() {
    let mut core = core64();
    poke(&core, 0x2_0000, &vec![b'x'; 9000]);
    poke(&core, 0x2_0000 + 8999, &[0]);
    set(&mut core, u64::MAX, 0, 0x2_0000);
    core.set_gpr(RAX, 0);
    run(&mut core, REPNE_SCASB).expect("strlen");
    assert_eq!(core.gpr(RCX), u64::MAX - 9000);
    assert_eq!(core.gpr(RDI), 0x2_0000 + 9000);
    assert_eq!(core.rflags() & ARITH, ZF | wardian_cpu::bits::rflags::PF);

    // Against the processor itself: sizes, directions, where it stops.
    for (down, at) in [(false, 700u64), (false, 0), (true, 500), (true, 1023)] {
        let mut core = core64();
        let mut data = vec![0x80u8; 4096 + 100];
        data[100 + at as usize * 4 + 3] = 0x11;
        poke(&core, 0x2_0f00, &data);
        core.set_gpr(RAX, 0x8080_8080);
        if down {
            core.set_rflags(DF | 2);
        }
        let start = 0x2_0f64 + if down { 1023 * 4 } else { 0 };
        set(&mut core, 1024, 0, start);
        run(&mut core, REPE_SCASD).expect("scan");
        let done = if down { 1024 - at } else { at + 1 };
        assert_eq!(core.gpr(RCX), 1024 - done, "{down} {at}");
        // 80808080h - 11808080h: no borrow, negative minus positive is positive: overflow.
        let flags = core.rflags() & ARITH;
        assert_eq!(flags, wardian_cpu::bits::rflags::PF | wardian_cpu::bits::rflags::OF);
    }
}

#[test]
fn single_forms_and_narrow_stores() {
    let mut core = core64();
    poke(&core, 0x2_0000, &0x1122_3344_5566_7788u64.to_le_bytes());
    set(&mut core, 77, 0x2_0000, 0x3_0000);
    run(&mut core, &[0x66, 0xa5]).expect("movsw");
    assert_eq!(registers(&core), [77, 0x2_0002, 0x3_0002]);
    assert_eq!(peek(&core, 0x3_0000, 4), [0x88, 0x77, 0, 0]);
    core.set_gpr(RAX, u64::MAX);
    run(&mut core, &[0xad]).expect("lodsd");
    assert_eq!(core.gpr(RAX), 0x3344_5566);
    core.set_gpr(RCX, 3000);
    poke(&core, 0x2_0006 + 2 * 2999, &[0xcd, 0xab]);
    core.set_gpr(RAX, u64::MAX);
    run(&mut core, REP_LODSW).expect("rep lodsw");
    assert_eq!(core.gpr(RAX), 0xffff_ffff_ffff_abcd);
    assert_eq!(core.gpr(RCX), 0);
    set(&mut core, 2000, 0, 0x5_0001);
    core.set_gpr(RAX, 0x0102_0304_0506_0708);
    run(&mut core, REP_STOSQ).expect("stosq");
    let filled = peek(&core, 0x5_0001, 16_000);
    assert!(filled.chunks(8).all(|chunk| chunk == [8, 7, 6, 5, 4, 3, 2, 1]));
}

#[test]
fn a_long_repetition_lets_interrupts_in() {
    let mut core = core64();
    set(&mut core, 0x8_0000, 0, 0x8_0000);
    once(&mut core, &[0xf3, 0xaa]).expect("stosb");
    assert_eq!(core.rip(), CODE);
    let done = 0x8_0000 - core.gpr(RCX);
    assert!(done > 0x1000 && done <= 33 * 0x1000, "{done:#x}");
    assert_eq!(core.gpr(RDI), 0x8_0000 + done);
    // Single step: one element, then a trap.
    set(&mut core, 3, 0, 0x8_0000);
    core.set_rflags(0x102);
    once(&mut core, &[0xf3, 0xaa]).expect("stosb");
    assert_eq!((core.gpr(RCX), core.rip()), (2, CODE));
    once(&mut core, &[0xf3, 0xaa]).expect("stosb");
    once(&mut core, &[0xf3, 0xaa]).expect("stosb");
    assert_eq!((core.gpr(RCX), core.rip()), (0, CODE + 2));
}

/// The zero-count rules of 32-bit addresses, against the processor if it is of Intel's design.
#[test]
#[allow(unsafe_code)]
fn zero_counts() {
    let high = 0xabcd_0000_0000u64;
    let mut core = core64();
    set(&mut core, high, high | 1, high | 2);
    run(&mut core, &[0x67, 0xf3, 0xa4]).expect("movsb");
    let mut native = [high, high | 1, high | 2];
    let [count, from, to] = &mut native;
    // SAFETY: the count is zero: nothing is accessed.
    unsafe {
        core::arch::asm!(
            ".byte 0x67, 0xf3, 0xa4",
            inout("rcx") * count,
            inout("rsi") * from,
            inout("rdi") * to
        );
    }
    if core.model.name.starts_with("host") {
        assert_eq!(registers(&core), native);
    }
    // With 64-bit addresses nothing happens at all.
    set(&mut core, 0, high, high);
    run(&mut core, REP_MOVSB).expect("movsb");
    assert_eq!(registers(&core), [0, high, high]);
}

#[test]
fn address_sizes_wrap_and_merge() {
    // 32-bit addresses in 64-bit mode zero-extend.
    let mut core = core64();
    poke(&core, 0x2_0000, b"hello");
    let high = 0x5555_0000_0000u64;
    set(&mut core, high | 5, high | 0x2_0000, high | 0x3_0000);
    run(&mut core, &[0x67, 0xf3, 0xa4]).expect("movsb");
    assert_eq!(registers(&core), [0, 0x2_0005, 0x3_0005]);
    assert_eq!(peek(&core, 0x3_0000, 5), b"hello");

    // 16-bit addresses wrap within the segment and keep the rest of the registers.
    let mut core = core16();
    poke(&core, 0xfffe, &[1, 2]);
    poke(&core, 0, &[3, 4]);
    set(&mut core, 0x7777_0004, 0x8888_fffe, 0x9999_4000);
    run(&mut core, REP_MOVSB).expect("movsb");
    assert_eq!(registers(&core), [0x7777_0000, 0x8888_0002, 0x9999_4004]);
    assert_eq!(peek(&core, 0x4000, 4), [1, 2, 3, 4]);
    // A word at the segment's end is beyond its limit.
    set(&mut core, 1, 0xffff, 0x4000);
    assert_eq!(run(&mut core, &[0xf3, 0xa5]), exception(13, Some(0)));
}

#[test]
fn segments_and_limits_count() {
    let mut core = core32();
    let mut fs = core.sys.segments[crate::core::seg::FS];
    fs.base = 0x2_0000;
    fs.limit = 0x10ff;
    core.set_segment(crate::core::seg::FS, fs);
    poke(&core, 0x2_0000, &pattern(0x2000));
    set(&mut core, 0x2000, 0, 0x4_0000);
    assert_eq!(run(&mut core, &[0x64, 0xf3, 0xa4]), exception(13, Some(0)));
    assert_eq!(registers(&core), [0x2000 - 0x1100, 0x1100, 0x4_1100]);
    assert_eq!(peek(&core, 0x4_0000, 0x1100), pattern(0x1100));
    assert_eq!(peek(&core, 0x4_1100, 1), [0]);
}

#[test]
fn devices_see_one_element_at_a_time() {
    let mut core = core64();
    poke(&core, 0x2_0000, &[1, 2, 3, 4, 5, 6]);
    set(&mut core, 3, 0x2_0000, DEVICE + 8);
    let seen = complete(&mut core, &[0xf3, 0x66, 0xa5], |_| 0).expect("movsw");
    let write = |gpa, data| Exit::MmioWrite { gpa, size: 2, data };
    assert_eq!(seen, [write(0x8000_0008, 0x201), write(0x8000_000a, 0x403), write(0x8000_000c, 0x605)]);

    set(&mut core, 3, DEVICE, 0x3_0000);
    let mut next = 10;
    let seen = complete(&mut core, REP_MOVSD, |_| {
        next += 1;
        next
    })
    .expect("movsd");
    let read = |gpa| Exit::MmioRead { gpa, size: 4 };
    assert_eq!(seen, [read(0x8000_0000), read(0x8000_0004), read(0x8000_0008)]);
    assert_eq!(peek(&core, 0x3_0000, 12), [11, 0, 0, 0, 12, 0, 0, 0, 13, 0, 0, 0]);

    // A destination that faults: the device is not asked.
    protect(&mut core, 0x3_0000, 5);
    set(&mut core, 1, DEVICE, 0x3_0000);
    assert_eq!(run(&mut core, REP_MOVSD), page_fault(7, 0x3_0000));
}

#[test]
fn code_pages_are_written_through_the_marks() {
    let mut core = core64();
    core.mem.mark_code(0x30, 0..64);
    poke(&core, 0x2_0000, &pattern(4096));
    set(&mut core, 4096, 0x2_0000, 0x3_0000);
    run(&mut core, REP_MOVSB).expect("movsb");
    assert_eq!(peek(&core, 0x3_0000, 4096), pattern(4096));
}
