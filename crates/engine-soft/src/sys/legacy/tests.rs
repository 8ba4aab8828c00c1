#![allow(unsafe_code)]

use core::arch::asm;

use wardian_cpu::bits::rflags::{AF, ARITH, CF, OF, PF, SF, ZF};
use wardian_cpu::bits::vector;

use super::harness::{
    CODE, DEVICE, complete, core16, core32, core64, exception, page_fault, peek, poke, protect, run,
};
use super::operand::{Alu, RAX, RBP, RBX, RCX, RDX, RSP, alu};
use crate::core::{Core, seg};

/// A small fixed generator: interesting values often.
struct Values(u64);

impl Values {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let random = self.0.rotate_right(16);
        match random % 8 {
            0 => 0,
            1 => u64::MAX,
            2 => 0x8000_0000_8000_8080,
            3 => 0x7fff_ffff_7fff_7f7f,
            4 => random & 0xff,
            _ => random,
        }
    }
}

/// `a op b` by the processor.
fn native(op: Alu, size: usize, mut a: u64, b: u64, flags: u64) -> (u64, u64) {
    let mut state = flags & ARITH | 2;
    macro_rules! two {
        ($name:literal, $x:literal, $y:literal) => {
            // SAFETY: register arithmetic; the flags are saved and restored through the stack.
            unsafe {
                asm!(
                    "push {state}", "popfq", concat!($name, " ", $x, ", ", $y), "pushfq", "pop {state}",
                    a = inout(reg) a, b = in(reg) b, state = inout(reg) state,
                )
            }
        };
    }
    macro_rules! one {
        ($name:literal, $x:literal) => {
            // SAFETY: as above.
            unsafe {
                asm!(
                    "push {state}", "popfq", concat!($name, " ", $x), "pushfq", "pop {state}",
                    a = inout(reg) a, state = inout(reg) state,
                )
            }
        };
    }
    macro_rules! by_size {
        ($name:literal) => {
            match size {
                1 => two!($name, "{a:l}", "{b:l}"),
                2 => two!($name, "{a:x}", "{b:x}"),
                4 => two!($name, "{a:e}", "{b:e}"),
                _ => two!($name, "{a}", "{b}"),
            }
        };
    }
    macro_rules! one_by_size {
        ($name:literal) => {
            match size {
                1 => one!($name, "{a:l}"),
                2 => one!($name, "{a:x}"),
                4 => one!($name, "{a:e}"),
                _ => one!($name, "{a}"),
            }
        };
    }
    match op {
        Alu::Add => by_size!("add"),
        Alu::Or => by_size!("or"),
        Alu::Adc => by_size!("adc"),
        Alu::Sbb => by_size!("sbb"),
        Alu::And => by_size!("and"),
        Alu::Sub => by_size!("sub"),
        Alu::Xor => by_size!("xor"),
        Alu::Inc => one_by_size!("inc"),
        Alu::Dec => one_by_size!("dec"),
        Alu::Neg => one_by_size!("neg"),
        Alu::Not => one_by_size!("not"),
    }
    (a & crate::access::size_mask(size), state & ARITH)
}

const ALL: [Alu; 11] = [
    Alu::Add,
    Alu::Or,
    Alu::Adc,
    Alu::Sbb,
    Alu::And,
    Alu::Sub,
    Alu::Xor,
    Alu::Inc,
    Alu::Dec,
    Alu::Neg,
    Alu::Not,
];

#[test]
fn arithmetic_is_the_processors() {
    let mut values = Values(1);
    for round in 0..4000 {
        let (a, b, flags) = (values.next(), values.next(), values.next() & ARITH);
        for op in ALL {
            let size = 1 << (round % 4);
            let (result, after) = alu(op, size, a, b, flags);
            let expected = native(op, size, a, b, flags);
            // AND, OR, XOR leave AF undefined; processors clear it.
            assert_eq!((result, after & ARITH), expected, "{op:?} {size} {a:x} {b:x} {flags:x}");
        }
    }
}

/// Runs one instruction in 32-bit mode on the processor itself: EAX and the flags after it.
struct Compatibility(*mut u8);

impl Compatibility {
    fn new(insn: &[u8]) -> Option<Compatibility> {
        // SAFETY: a fresh mapping below 2 GiB, filled with code before it is called.
        unsafe {
            let page = libc::mmap(
                std::ptr::null_mut(),
                4096,
                libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_32BIT,
                -1,
                0,
            );
            if page == libc::MAP_FAILED {
                return None;
            }
            let page = page.cast::<u8>();
            let near = |offset: u32| (page as usize as u32 + offset).to_le_bytes();
            let put = |offset: usize, parts: &[&[u8]]| {
                let bytes = parts.concat();
                std::ptr::copy_nonoverlapping(bytes.as_ptr(), page.add(offset), bytes.len());
            };
            // mov [page+800h], rsp; jmp far [page+810h]
            put(0, &[&[0x48, 0x89, 0x24, 0x25], &near(0x800), &[0xff, 0x2c, 0x25], &near(0x810)]);
            // the instruction; jmp 33h:page+200h
            put(0x100, &[insn, &[0xea], &near(0x200), &[0x33, 0]]);
            // mov rsp, [page+800h]; ret
            put(0x200, &[&[0x48, 0x8b, 0x24, 0x25], &near(0x800), &[0xc3]]);
            put(0x810, &[&near(0x100), &[0x23, 0]]);
            Some(Compatibility(page))
        }
    }

    fn run(&self, eax: u64, flags: u64) -> (u64, u64) {
        let (mut rax, mut state) = (eax, flags | 2);
        // SAFETY: the page does as `new` says; RSP is restored from memory, other registers are untouched.
        unsafe {
            asm!(
                "push rsi", "popfq", "call rdi", "pushfq", "pop rsi",
                in("rdi") self.0, inout("rsi") state, inout("rax") rax,
                // Not specified to survive a stay in 32-bit mode.
                out("r8") _, out("r9") _, out("r10") _, out("r11") _, out("r12") _, out("r13") _,
                out("r14") _, out("r15") _,
            );
        }
        (rax & 0xffff_ffff, state & ARITH)
    }
}

impl Drop for Compatibility {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`.
        unsafe { libc::munmap(self.0.cast(), 4096) };
    }
}

/// Every AL, several AH, with CF and AF, against the processor in 32-bit mode.
#[test]
fn decimal_arithmetic_is_the_processors() {
    let cases: [(&[u8], u64); 8] = [
        (&[0x37], AF | CF),                // AAA
        (&[0x3f], AF | CF),                // AAS
        (&[0x27], AF | CF | SF | ZF | PF), // DAA
        (&[0x2f], AF | CF | SF | ZF | PF), // DAS
        (&[0xd4, 10], SF | ZF | PF),       // AAM
        (&[0xd4, 7], SF | ZF | PF),
        (&[0xd5, 10], SF | ZF | PF), // AAD
        (&[0xd6], ARITH),            // SALC
    ];
    let mut core = core32();
    for (insn, defined) in cases {
        let Some(processor) = Compatibility::new(insn) else {
            eprintln!("skipped, because there is no memory below 2 GiB");
            return;
        };
        for ax in (0..0x400u64).chain(0xff00..0x1_0000) {
            for flags in [0, CF, AF, CF | AF, ARITH] {
                let eax = 0x1234_0000 | ax;
                core.set_gpr(RAX, eax);
                core.set_rflags(flags | 2);
                run(&mut core, insn).expect("runs");
                let expected = processor.run(eax, flags);
                assert_eq!(core.gpr(RAX), expected.0, "{insn:x?} {ax:x} {flags:x}");
                assert_eq!(core.rflags() & defined, expected.1 & defined, "{insn:x?} {ax:x} {flags:x}");
            }
        }
    }
}

#[test]
fn decimal_examples_of_the_manual() {
    let mut core = core32();
    for (insn, ax, flags, after, after_flags) in [
        (&[0x27u8][..], 0xae, PF | SF, 0x14, AF | CF | PF), // DAA of 79h + 35h (SDM vol. 2A, DAA)
        (&[0x2f], 0xaa, CF | SF, 0x44, CF | AF | PF),       // DAS after 35h - 47h = EEh is 88h; here AAh
        (&[0x37], 0x000f, 0, 0x0105, CF | AF),
        (&[0x3f], 0x02ff, AF, 0x0109, CF | AF),
    ] {
        core.set_gpr(RAX, ax);
        core.set_rflags(flags | 2);
        run(&mut core, insn).expect("runs");
        assert_eq!(core.gpr(RAX), after, "{insn:x?}");
        assert_eq!(core.rflags() & (CF | AF), after_flags & (CF | AF), "{insn:x?}");
    }
    assert_eq!(run(&mut core, &[0xd4, 0]), exception(vector::DE, None));
}

#[test]
fn bound_compares_signed() {
    let mut core = core32();
    poke(&core, 0x3000, &[0xff, 0xff, 5, 0]);
    for (index, inside) in [(0u64, true), (5, true), (6, false), (0xffff, true), (0xfffe, false)] {
        core.set_gpr(RAX, index);
        let result = run(&mut core, &[0x66, 0x62, 0x05, 0, 0x30, 0, 0]);
        assert_eq!(result, if inside { Ok(()) } else { exception(vector::BR, None) }, "{index:x}");
    }
}

#[test]
fn pushes_and_pops_of_a_small_stack() {
    let mut core = core32();
    // A 16-bit stack segment with a base: only SP counts, and it wraps.
    core.set_segment(
        seg::SS,
        wardian_cpu::Segment { selector: 0x18, base: 0x2_0000, limit: 0xffff, rights: 0x93 },
    );
    core.set_gpr(RSP, 0x7777_0002);
    core.set_gpr(RAX, 0x1122_3344);
    assert_eq!(run(&mut core, &[0x50]), exception(vector::SS, Some(0)), "wraps within a dword");
    assert_eq!(core.gpr(RSP), 0x7777_0002);
    core.set_gpr(RSP, 0x7777_0000);
    run(&mut core, &[0x50]).expect("push eax");
    assert_eq!(core.gpr(RSP), 0x7777_fffc);
    assert_eq!(peek(&core, 0x2_fffc, 4), [0x44, 0x33, 0x22, 0x11]);
    run(&mut core, &[0x66, 0x59]).expect("pop cx");
    assert_eq!((core.gpr(RCX), core.gpr(RSP)), (0x3344, 0x7777_fffe));
    // push dword [esp-relative] uses DS for nothing else than its own default: SS here.
    core.set_gpr(RSP, 0x100);
    poke(&core, 0x2_0100, &[1, 2, 3, 4]);
    run(&mut core, &[0xff, 0x34, 0x24]).expect("push dword [esp]");
    assert_eq!((core.gpr(RSP), peek(&core, 0x2_00fc, 4)), (0xfc, vec![1, 2, 3, 4]));
    // pop dword [esp]: the address is that after the pop.
    run(&mut core, &[0x8f, 0x04, 0x24]).expect("pop dword [esp]");
    assert_eq!((core.gpr(RSP), peek(&core, 0x2_0100, 4)), (0x100, vec![1, 2, 3, 4]));
    run(&mut core, &[0x6a, 0xfe]).expect("push -2");
    assert_eq!(peek(&core, 0x2_00fc, 4), [0xfe, 0xff, 0xff, 0xff]);
    run(&mut core, &[0x5c]).expect("pop esp");
    assert_eq!(core.gpr(RSP), 0xffff_fffe);
}

#[test]
fn push_and_pop_that_fault_change_nothing() {
    let mut core = core64();
    protect(&mut core, 0x3_0000, 5);
    core.set_gpr(RSP, 0x3_1000);
    assert_eq!(run(&mut core, &[0x50]), page_fault(7, 0x3_0ff8));
    assert_eq!(core.gpr(RSP), 0x3_1000);
    core.set_gpr(RSP, 0x3_0000);
    core.set_gpr(RAX, 0x3_0010);
    assert_eq!(run(&mut core, &[0x8f, 0x00]), page_fault(7, 0x3_0010));
    assert_eq!((core.gpr(RSP), core.rip()), (0x3_0000, CODE));
    core.set_gpr(RSP, 0x8000_0000_0000_0000);
    assert_eq!(run(&mut core, &[0x50]), exception(vector::SS, Some(0)));
}

#[test]
fn all_registers_at_once() {
    let mut core = core32();
    for n in 0..8 {
        core.set_gpr(n, 0x1111_1111 * n as u64);
    }
    core.set_gpr(RSP, 0x8000);
    run(&mut core, &[0x60]).expect("pushad");
    assert_eq!(core.gpr(RSP), 0x8000 - 32);
    let pushed: Vec<u32> =
        peek(&core, 0x7fe0, 32).chunks(4).map(|c| u32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect();
    let expected = [0x7777_7777, 0x6666_6666, 0x5555_5555, 0x8000, 0x3333_3333, 0x2222_2222, 0x1111_1111, 0];
    assert_eq!(pushed, expected);
    poke(&core, 0x7fe0, &[9, 9, 9, 9]);
    poke(&core, 0x7fec, &[1, 2, 3, 4]);
    run(&mut core, &[0x61]).expect("popad");
    assert_eq!((core.gpr(7), core.gpr(RSP), core.gpr(RBP)), (0x0909_0909, 0x8000, 0x5555_5555));
    run(&mut core, &[0x66, 0x60]).expect("pushaw");
    assert_eq!(core.gpr(RSP), 0x8000 - 16);
    core.set_gpr(RAX, 0xffff_ffff);
    run(&mut core, &[0x66, 0x61]).expect("popaw");
    assert_eq!((core.gpr(RAX), core.gpr(RSP)), (0xffff_0000, 0x8000));
}

/// ENTER and LEAVE by the processor: what is on the stack, RSP and RBP relative to the start.
#[test]
fn frames_are_the_processors() {
    for level in [0u8, 1, 2, 3, 31] {
        let mut native = [0u64; 128];
        let base = native.as_mut_ptr() as u64;
        for (n, word) in native.iter_mut().enumerate() {
            *word = 0x1000 + n as u64;
        }
        let start = base + 100 * 8;
        let (mut top, mut frame) = (start, base + 110 * 8);
        macro_rules! enter {
            ($level:literal) => {
                // SAFETY: the stack is switched to the array and back; only the array is written.
                unsafe {
                    asm!(
                        "xchg rsp, {top}", "xchg rbp, {frame}", concat!("enter 64, ", $level),
                        "xchg rbp, {frame}", "xchg rsp, {top}",
                        top = inout(reg) top, frame = inout(reg) frame,
                    )
                }
            };
        }
        match level {
            0 => enter!("0"),
            1 => enter!("1"),
            2 => enter!("2"),
            3 => enter!("3"),
            _ => enter!("31"),
        }
        let mut core = core64();
        let place = 0x4_0000;
        for n in 0..128u64 {
            poke(&core, place + n * 8, &(0x1000 + n).to_le_bytes());
        }
        core.set_gpr(RSP, place + 100 * 8);
        core.set_gpr(RBP, place + 110 * 8);
        run(&mut core, &[0xc8, 64, 0, level]).expect("enter");
        assert_eq!(core.gpr(RSP) - place, top - base, "level {level}");
        assert_eq!(core.gpr(RBP) - place, frame - base, "level {level}");
        for (n, word) in native.iter().enumerate().skip(100 - 1 - usize::from(level)) {
            let bytes = peek(&core, place + n as u64 * 8, 8);
            let ours = u64::from_le_bytes(bytes.try_into().expect("eight"));
            let ours = if ours >= place { ours - place } else { ours };
            let theirs = if *word >= base { word - base } else { *word };
            assert_eq!(ours, theirs, "level {level}, word {n}");
        }
        run(&mut core, &[0xc9]).expect("leave");
        assert_eq!((core.gpr(RSP), core.gpr(RBP)), (place + 100 * 8, place + 110 * 8));
    }
    // The page of the final stack pointer must be writable.
    let mut core = core64();
    protect(&mut core, 0x2_e000, 5);
    core.set_gpr(RSP, 0x3_0000);
    assert_eq!(run(&mut core, &[0xc8, 0xf8, 0x1f, 0]), page_fault(7, 0x2_e000));
    assert_eq!((core.gpr(RSP), core.gpr(RBP)), (0x3_0000, 0));
}

#[test]
fn near_transfers() {
    let mut core = core64();
    core.set_gpr(RSP, 0x8000);
    run(&mut core, &[0xe8, 0x10, 0, 0, 0]).expect("call");
    assert_eq!((core.rip(), core.gpr(RSP)), (CODE + 0x15, 0x7ff8));
    assert_eq!(peek(&core, 0x7ff8, 8), (CODE + 5).to_le_bytes());
    run(&mut core, &[0xc2, 8, 0]).expect("ret 8");
    assert_eq!((core.rip(), core.gpr(RSP)), (CODE + 5, 0x8008));
    // Not canonical: #GP(0), nothing changed.
    core.set_gpr(RAX, 1 << 47);
    for insn in [&[0xff, 0xd0][..], &[0xff, 0xe0]] {
        assert_eq!(run(&mut core, insn), exception(vector::GP, Some(0)));
        assert_eq!((core.rip(), core.gpr(RSP)), (CODE, 0x8008));
    }
    poke(&core, 0x8008, &(1u64 << 63).to_le_bytes());
    assert_eq!(run(&mut core, &[0xc3]), exception(vector::GP, Some(0)));
    assert_eq!(core.gpr(RSP), 0x8008);
    // Indirect through memory.
    poke(&core, 0x5000, &0x7000u64.to_le_bytes());
    run(&mut core, &[0xff, 0x24, 0x25, 0, 0x50, 0, 0]).expect("jmp");
    assert_eq!(core.rip(), 0x7000);

    // Beyond the limit of CS.
    let mut core = core32();
    let mut code = core.sys.segments[seg::CS];
    code.limit = 0x1fff;
    core.set_segment(seg::CS, code);
    assert_eq!(run(&mut core, &[0xe9, 0xf6, 0x0f, 0, 0]).map(|()| core.rip()), Ok(0x1ffb));
    assert_eq!(run(&mut core, &[0xe9, 0xfb, 0x0f, 0, 0]), exception(vector::GP, Some(0)));
    core.set_rflags(2);
    assert_eq!(run(&mut core, &[0x0f, 0x84, 0xfb, 0x0f, 0, 0]), Ok(()), "not taken: not checked");
    assert_eq!(core.rip(), CODE + 6);
    // A 16-bit operand size cuts EIP.
    core.set_segment(seg::CS, wardian_cpu::Segment { limit: 0xffff_ffff, ..code });
    core.set_gpr(RAX, 0xdead_1234);
    run(&mut core, &[0x66, 0xff, 0xe0]).expect("jmp ax");
    assert_eq!(core.rip(), 0x1234);
}

#[test]
fn conditions_and_counts() {
    let mut core = core64();
    let taken = |core: &mut Core, insn: &[u8]| {
        run(core, insn).expect("runs");
        core.rip() != CODE + insn.len() as u64
    };
    let mut values = Values(7);
    for _ in 0..200 {
        let flags = values.next() & ARITH;
        core.set_rflags(flags | 2);
        let [c, z, s, o, p] = [CF, ZF, SF, OF, PF].map(|bit| flags & bit != 0);
        let expected = [o, c, z, c || z, s, p, s != o, z || s != o];
        for (n, holds) in expected.into_iter().enumerate() {
            assert_eq!(taken(&mut core, &[0x70 + 2 * n as u8, 0x20]), holds, "{n} {flags:x}");
            assert_eq!(taken(&mut core, &[0x71 + 2 * n as u8, 0x20]), !holds, "{n} {flags:x}");
        }
    }
    core.set_rflags(ZF | 2);
    core.set_gpr(RCX, 1 << 32);
    assert!(taken(&mut core, &[0xe2, 0x20]), "loop counts RCX");
    assert_eq!(core.gpr(RCX), 0xffff_ffff);
    assert!(!taken(&mut core, &[0xe0, 0x20]), "loopne");
    core.set_gpr(RCX, (7 << 32) | 1);
    assert!(!taken(&mut core, &[0x67, 0xe1, 0x20]), "loope with ECX");
    assert_eq!(core.gpr(RCX), 0);
    assert!(taken(&mut core, &[0xe3, 0x20]));
    core.set_gpr(RCX, 7 << 32);
    assert!(!taken(&mut core, &[0xe3, 0x20]));
    assert!(taken(&mut core, &[0x67, 0xe3, 0x20]));
}

#[test]
fn locked_arithmetic_in_ram_across_pages_and_in_devices() {
    // lock add [rbx], eax; lock xadd; lock cmpxchg; lock inc; xchg; lock neg; lock not; lock bts/btr/btc imm
    let mut core = core64();
    for (at, size) in [(0x2_0010u64, 4), (0x2_0ffe, 4), (0x2_0fff, 2), (0x2_0ffb, 8)] {
        let prefix: &[u8] = match size {
            2 => &[0xf0, 0x66],
            8 => &[0xf0, 0x48],
            _ => &[0xf0],
        };
        let go = |core: &mut Core, tail: &[u8]| {
            core.set_gpr(RBX, at);
            run(core, &[prefix, tail].concat()).expect("runs");
        };
        let value = |core: &Core| {
            let mut bytes = [0; 8];
            bytes[..size].copy_from_slice(&peek(core, at, size));
            u64::from_le_bytes(bytes)
        };
        let mask = crate::access::size_mask(size);
        poke(&core, at, &[0xff; 8]);
        core.set_gpr(RAX, 2);
        go(&mut core, &[0x01, 0x03]); // add
        assert_eq!((value(&core), core.rflags() & ARITH), (1, CF | AF), "{at:x}");
        core.set_gpr(RCX, 5);
        go(&mut core, &[0x0f, 0xc1, 0x0b]); // xadd
        assert_eq!((value(&core), core.gpr(RCX)), (6, 1));
        core.set_gpr(RAX, 7);
        core.set_gpr(RCX, 9);
        go(&mut core, &[0x0f, 0xb1, 0x0b]); // cmpxchg fails
        assert_eq!((value(&core), core.gpr(RAX)), (6, 6));
        assert_eq!(core.rflags() & (ZF | CF), 0);
        go(&mut core, &[0x0f, 0xb1, 0x0b]); // succeeds
        assert_eq!((value(&core), core.rflags() & ZF), (9, ZF));
        core.set_rflags(CF | 2);
        go(&mut core, &[0xff, 0x03]); // inc keeps CF
        assert_eq!((value(&core), core.rflags() & CF), (10, CF));
        go(&mut core, &[0xf7, 0x13]); // not
        go(&mut core, &[0xf7, 0x1b]); // neg
        assert_eq!(value(&core), 11);
        go(&mut core, &[0x0f, 0xba, 0x33, 0]); // btr 0
        assert_eq!((value(&core), core.rflags() & CF), (10, CF));
        go(&mut core, &[0x0f, 0xba, 0x3b, 2]); // btc 2
        go(&mut core, &[0x0f, 0xba, 0x2b, 0]); // bts 0
        assert_eq!((value(&core), core.rflags() & CF), (15, 0));
        core.set_gpr(RCX, 0x1_2345_6789_abcd);
        let mut xchg = prefix[1..].to_vec();
        xchg.extend([0x87, 0x0b]);
        core.set_gpr(RBX, at);
        run(&mut core, &xchg).expect("xchg");
        assert_eq!(value(&core), 0x1_2345_6789_abcd & mask);
        assert_eq!(core.gpr(RCX) & mask, 15);
    }

    // Device memory: read, then write.
    core.set_gpr(RBX, DEVICE);
    core.set_gpr(RAX, 1);
    let seen = complete(&mut core, &[0xf0, 0x09, 0x03], |_| 0x100).expect("or");
    let gpa = 0x8000_0000;
    use wardian_cpu::Exit::{MmioRead, MmioWrite};
    assert_eq!(seen, [MmioRead { gpa, size: 4 }, MmioWrite { gpa, size: 4, data: 0x101 }]);

    // A fault on the second page: as a write, nothing changed.
    protect(&mut core, 0x2_1000, 5);
    core.set_gpr(RBX, 0x2_0ffe);
    let before = peek(&core, 0x2_0ff8, 16);
    assert_eq!(run(&mut core, &[0xf0, 0x01, 0x03]), page_fault(7, 0x2_1000));
    assert_eq!(peek(&core, 0x2_0ff8, 16), before);
}

#[test]
fn wide_compare_exchange() {
    let mut core = core64();
    let at = 0x2_0010u64;
    for code_page in [false, true] {
        if code_page {
            core.mem.mark_code(0x20, 0..64);
        }
        poke(&core, at, &[1; 16]);
        core.set_gpr(RBX, at);
        let set = |core: &mut Core, rax, rdx, rbx, rcx| {
            for (n, value) in [(RAX, rax), (RDX, rdx), (RBX, rbx), (RCX, rcx)] {
                core.set_gpr(n, value);
            }
        };
        let ones = u64::from_le_bytes([1; 8]);
        let insn = [0xf0, 0x48, 0x0f, 0xc7, 0x0c, 0x25, 0x10, 0, 2, 0];
        set(&mut core, ones, 2, 3, 4);
        core.set_rflags(ARITH | 2);
        run(&mut core, &insn).expect("cmpxchg16b");
        assert_eq!(core.rflags() & ARITH, ARITH & !ZF);
        assert_eq!((core.gpr(RAX), core.gpr(RDX)), (ones, ones));
        set(&mut core, ones, ones, 3, 4);
        run(&mut core, &insn).expect("cmpxchg16b");
        assert_eq!(core.rflags() & ZF, ZF);
        assert_eq!(peek(&core, at, 16), [3u64.to_le_bytes(), 4u64.to_le_bytes()].concat());
        // CMPXCHG8B takes halves, and zero-extends.
        set(&mut core, 9, 9, 0x1_0000_0005, 6);
        let insn = [0xf0, 0x0f, 0xc7, 0x0c, 0x25, 0x10, 0, 2, 0];
        run(&mut core, &insn).expect("cmpxchg8b");
        assert_eq!((core.gpr(RAX), core.gpr(RDX), core.rflags() & ZF), (3, 0, 0));
        run(&mut core, &insn).expect("cmpxchg8b");
        assert_eq!(peek(&core, at, 8), [5, 0, 0, 0, 6, 0, 0, 0]);
    }
    core.set_gpr(RBX, at + 8);
    assert_eq!(run(&mut core, &[0x48, 0x0f, 0xc7, 0x0b]), exception(vector::GP, Some(0)));
}

#[test]
fn bit_strings_reach_far() {
    let mut core = core64();
    let base = 0x4_0000u64;
    for (bit, size) in
        [(0i64, 4), (31, 4), (32, 4), (-1, 4), (100_003, 4), (-70_001, 8), (1 << 18, 8), (-32_768, 2)]
    {
        let prefix: &[u8] = match size {
            2 => &[0x66],
            8 => &[0x48],
            _ => &[],
        };
        core.set_gpr(RBX, base);
        core.set_gpr(RCX, bit as u64 & crate::access::size_mask(size));
        let byte = base.wrapping_add((bit >> 3) as u64);
        let mask = 1u8 << (bit & 7);
        poke(&core, byte, &[0]);
        let mut go = |opcode: u8, lock: bool| {
            let lock: &[u8] = if lock { &[0xf0] } else { &[] };
            run(&mut core, &[lock, prefix, &[0x0f, opcode, 0x0b]].concat()).expect("runs");
            (core.rflags() & CF, peek(&core, byte, 1)[0])
        };
        assert_eq!(go(0xa3, false), (0, 0), "bt {bit} {size}");
        assert_eq!(go(0xab, true), (0, mask), "bts {bit}");
        assert_eq!(go(0xa3, false), (CF, mask), "bt {bit}");
        assert_eq!(go(0xbb, true), (CF, 0), "btc {bit}");
        assert_eq!(go(0xab, false), (0, mask), "bts {bit}");
        assert_eq!(go(0xb3, true), (CF, 0), "btr {bit}");
    }
}

#[test]
fn small_things() {
    let mut core = core64();
    core.set_gpr(RBX, 0x2_0000);
    core.set_gpr(RAX, 0xaabb_cc10);
    poke(&core, 0x2_0010, &[0x5a]);
    run(&mut core, &[0xd7]).expect("xlat");
    assert_eq!(core.gpr(RAX), 0xaabb_cc5a);
    core.set_rflags(CF | SF | OF | 2);
    run(&mut core, &[0x9f]).expect("lahf");
    assert_eq!(core.gpr(RAX), 0xaabb_835a);
    core.set_gpr(RAX, 0xd700);
    run(&mut core, &[0x9e]).expect("sahf");
    assert_eq!(core.rflags() & ARITH, OF | SF | ZF | AF | PF | CF);
    run(&mut core, &[0xf5]).expect("cmc");
    assert_eq!(core.rflags() & CF, 0);
    poke(&core, 0x2_0020, &[1, 2, 3, 4, 5, 6, 7, 8]);
    run(&mut core, &[0x48, 0xa1, 0x20, 0, 2, 0, 0, 0, 0, 0]).expect("mov rax, moffs");
    assert_eq!(core.gpr(RAX), 0x0807_0605_0403_0201);
    run(&mut core, &[0x0f, 0x38, 0xf1, 0x43, 0x30]).expect("movbe [rbx+30h], eax");
    assert_eq!(peek(&core, 0x2_0030, 4), [4, 3, 2, 1]);
    run(&mut core, &[0x66, 0x0f, 0x38, 0xf0, 0x43, 0x20]).expect("movbe ax, [rbx+20h]");
    assert_eq!(core.gpr(RAX), 0x0807_0605_0403_0102);
    // 16-bit addresses.
    let mut core = core16();
    core.set_gpr(RAX, 0x1234_5678);
    run(&mut core, &[0xa3, 0, 0x40]).expect("mov [4000h], ax");
    assert_eq!(peek(&core, 0x4000, 3), [0x78, 0x56, 0]);
}
