#![allow(unsafe_code)]

use core::arch::asm;

use wardian_cpu::bits::{cr0, cr4, vector};

use super::{COMPACT, EXTENDED, HEADER, MXCSR_INIT, dword, qword};
use crate::core::Core;
use crate::fpu;
use crate::sys::legacy::harness::{CODE, core32, core64, exception, page_fault, peek, poke, protect, run};
use crate::sys::legacy::operand::{RAX, RBX, RDX};

const AT: u64 = 0x2_0000;
const XSAVE: &[u8] = &[0x0f, 0xae, 0x23];
const XRSTOR: &[u8] = &[0x0f, 0xae, 0x2b];
const XSAVEC: &[u8] = &[0x0f, 0xc7, 0x23];
const FXSAVE: &[u8] = &[0x0f, 0xae, 0x03];
const FXRSTOR: &[u8] = &[0x0f, 0xae, 0x0b];
const FNSAVE: &[u8] = &[0xdd, 0x33];
const FRSTOR: &[u8] = &[0xdd, 0x23];
const FNSTENV: &[u8] = &[0xd9, 0x33];
const FLDENV: &[u8] = &[0xd9, 0x23];

/// Gives the thread back its own state at the end.
struct Live(Box<Core>);

impl Live {
    fn new(mut core: Box<Core>) -> Live {
        core.set_gpr(RBX, AT);
        core.set_gpr(RAX, u64::MAX);
        core.set_gpr(RDX, u64::MAX);
        fpu::enter(&mut core);
        Live(core)
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        fpu::leave(&mut self.0);
    }
}

fn fill(core: &mut Core, seed: u8) {
    for (n, register) in core.ctx.get_mut().vec.iter_mut().enumerate().take(16) {
        for (m, byte) in register.iter_mut().enumerate() {
            *byte = if m < 32 { seed.wrapping_add((n * 37 + m * 3) as u8) | 1 } else { 0 };
        }
    }
}

fn vectors(core: &Core) -> Vec<Vec<u8>> {
    core.c().vec[..16].iter().map(|register| register[..32].to_vec()).collect()
}

#[test]
fn extended_state_survives_in_both_formats() {
    for (save, compact) in [(XSAVE, false), (XSAVEC, true)] {
        let mut live = Live::new(core64());
        let core = &mut *live.0;
        if compact && !core.model.has(wardian_cpu::Feature::Xsavec) {
            eprintln!("skipped, because the processor has no XSAVEC");
            continue;
        }
        fill(core, 9);
        let before = vectors(core);
        poke(core, AT, &[0x55; 4096]);
        poke(core, AT + HEADER as u64, &[0; 64]);
        run(core, save).expect("saves");
        let image = peek(core, AT, 1024);
        assert_eq!(qword(&image, HEADER), 7);
        assert_eq!(qword(&image, HEADER + 8), if compact { COMPACT | 7 } else { 0 });
        assert_eq!(dword(&image, 24), MXCSR_INIT);
        assert_eq!(image[6..24], [0; 18], "no host address");
        assert_eq!(image[416..512], [0x55; 96], "not the processor's");
        for n in 0..16 {
            assert_eq!(image[160 + 16 * n..176 + 16 * n], before[n][..16]);
            assert_eq!(image[EXTENDED + 16 * n..EXTENDED + 16 + 16 * n], before[n][16..]);
        }
        fill(core, 100);
        assert_ne!(vectors(core), before);
        run(core, XRSTOR).expect("restores");
        assert_eq!(vectors(core), before);

        // A component whose bit is clear goes to its initial state; one not asked for stays.
        fill(core, 33);
        let other = vectors(core);
        poke(core, AT + HEADER as u64, &[5]);
        core.set_gpr(RAX, 2);
        run(core, XRSTOR).expect("restores");
        for (now, other) in vectors(core).iter().zip(&other) {
            assert_eq!(now[..16], [0; 16]);
            assert_eq!(now[16..], other[16..]);
        }
    }
}

#[test]
fn a_partial_save_keeps_the_other_bits_and_bytes() {
    let mut live = Live::new(core64());
    let core = &mut *live.0;
    fill(core, 1);
    poke(core, AT, &[0x55; 1024]);
    poke(core, AT + HEADER as u64, &[0; 64]);
    poke(core, AT + HEADER as u64, &[3]);
    core.set_gpr(RAX, 4);
    run(core, XSAVE).expect("saves");
    let image = peek(core, AT, 1024);
    assert_eq!(qword(&image, HEADER), 7);
    assert_eq!(image[..24], [0x55; 24]);
    assert_eq!(dword(&image, 24), MXCSR_INIT, "MXCSR goes with AVX");
    assert_eq!(image[160..416], [0x55; 256]);
    assert_eq!(image[EXTENDED..EXTENDED + 16], core.c().vec[0][16..32]);
}

#[test]
fn headers_and_addresses_are_checked() {
    let mut live = Live::new(core64());
    let core = &mut *live.0;
    poke(core, AT, &[0; 4096]);
    run(core, XSAVE).expect("saves");
    let gp = exception(vector::GP, Some(0));
    let header = AT + HEADER as u64;
    for (offset, bytes) in [(0u64, &[0xffu8][..]), (8, &[1]), (16, &[1]), (15, &[0xc0])] {
        let old = peek(core, header + offset, 1);
        poke(core, header + offset, bytes);
        assert_eq!(run(core, XRSTOR), gp, "{offset}");
        poke(core, header + offset, &old);
    }
    if core.model.has(wardian_cpu::Feature::Xsavec) {
        poke(core, header + 8, &(COMPACT | 3).to_le_bytes());
        assert_eq!(run(core, XRSTOR), gp, "XSTATE_BV beyond XCOMP_BV");
        poke(core, header + 8, &(COMPACT | 7).to_le_bytes());
        assert_eq!(run(core, XRSTOR), Ok(()));
        poke(core, header + 63, &[1]);
        assert_eq!(run(core, XRSTOR), gp, "reserved byte");
        poke(core, header + 63, &[0]);
    }
    poke(core, header + 8, &[0; 8]);
    let before = vectors(core);
    poke(core, AT + 24, &[0, 0, 1, 0]);
    assert_eq!(run(core, XRSTOR), gp, "MXCSR");
    assert_eq!(vectors(core), before);
    poke(core, AT + 24, &MXCSR_INIT.to_le_bytes());
    core.set_gpr(RBX, AT + 32);
    assert_eq!((run(core, XRSTOR), run(core, XSAVE)), (gp, gp));
    core.set_gpr(RBX, AT + 8);
    assert_eq!((run(core, FXRSTOR), run(core, FXSAVE)), (gp, gp));

    // The whole area is checked before the first byte is written.
    protect(core, AT + 0x1000, 5);
    core.set_gpr(RBX, AT + 0x1000 - 576);
    poke(core, AT, &[0x55; 4096]);
    assert_eq!(run(core, XSAVE), page_fault(7, AT + 0x1000));
    assert_eq!(peek(core, AT, 4096), [0x55; 4096]);
    assert_eq!(core.rip(), CODE);

    core.sys.cr0 |= cr0::TS;
    let nm = exception(vector::NM, None);
    for insn in [XSAVE, XRSTOR, FXSAVE, FXRSTOR, FNSAVE, FRSTOR, FNSTENV, FLDENV] {
        assert_eq!(run(core, insn), nm);
    }
    core.sys.cr4 &= !cr4::OSXSAVE;
    let ud = exception(vector::UD, None);
    assert_eq!((run(core, XSAVE), run(core, XRSTOR)), (ud, ud));
}

#[test]
fn only_eight_registers_outside_64_bit_mode() {
    let mut live = Live::new(core32());
    let core = &mut *live.0;
    fill(core, 5);
    let before = vectors(core);
    for (save, restore, avx) in [(XSAVE, XRSTOR, true), (FXSAVE, FXRSTOR, false)] {
        poke(core, AT, &[0x55; 1024]);
        poke(core, AT + HEADER as u64, &[0; 64]);
        run(core, save).expect("saves");
        let image = peek(core, AT, 1024);
        assert_eq!(
            image[160..288].chunks(16).collect::<Vec<_>>(),
            before[..8].iter().map(|v| &v[..16]).collect::<Vec<_>>()
        );
        assert_eq!(image[288..416], [0x55; 128]);
        if avx {
            assert_eq!(image[EXTENDED + 112..EXTENDED + 128], before[7][16..]);
            assert_eq!(image[EXTENDED + 128..EXTENDED + 256], [0x55; 128]);
        }
        fill(core, 77);
        let other = vectors(core);
        run(core, restore).expect("restores");
        let now = vectors(core);
        assert_eq!(now[8..], other[8..]);
        let len = if avx { 32 } else { 16 };
        assert!(now[..8].iter().zip(&before).all(|(now, before)| now[..len] == before[..len]));
        fill(core, 5);
    }
}

#[test]
fn fxsave_round_trip() {
    let mut live = Live::new(core64());
    let core = &mut *live.0;
    fill(core, 3);
    let before = vectors(core);
    run(core, FXSAVE).expect("saves");
    let mut image = peek(core, AT, 512);
    assert_eq!(qword(&image, 8), 0);
    image[0] = 0x7e; // invalid-operation exceptions unmasked
    image[3] = 5 << 3; // TOP
    image[4] = 0x81;
    image[24] = 0xa0; // a sticky flag
    image[32..42].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 0x88, 0x34, 0x12]);
    fill(core, 4);
    poke(core, AT, &image);
    run(core, FXRSTOR).expect("restores");
    assert_eq!(vectors(core)[3][..16], before[3][..16]);
    core.set_gpr(RBX, AT + 0x400);
    run(core, FXSAVE).expect("saves");
    let again = peek(core, AT + 0x400, 512);
    assert_eq!(again[..24], image[..24]);
    assert_eq!(again[24..416], image[24..416]);
    image[25] = 0x80;
    image[26] = 1;
    poke(core, AT, &image);
    core.set_gpr(RBX, AT);
    assert_eq!(run(core, FXRSTOR), exception(vector::GP, Some(0)));
}

/// FRSTOR, then FNSTENV and FNSAVE, by us and by the processor: everything but the pointers is equal.
#[test]
fn x87_state_is_the_processors() {
    let registers: [[u8; 10]; 8] = [
        [0; 10],
        [0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f], // 1.0
        [0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0xff], // -infinity
        [1, 0, 0, 0, 0, 0, 0, 0xc0, 0xff, 0x7f], // a NaN
        [1, 0, 0, 0, 0, 0, 0, 0, 0, 0],          // denormal
        [0, 0, 0, 0, 0, 0, 0, 0x40, 0xff, 0x3f], // unnormal
        [0xff; 10],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0x80], // -0.0
    ];
    for (control, status, tags) in [
        (0x37fu16, 0u16, 0xffffu16),
        (0x37f, 3 << 11, 0),
        (0x27f, 7 << 11 | 0x4705, 0x0ff0),
        (0x340, 5 << 11 | 0x41, 0x5a5a), // unmasked: an exception waits
        (0x37f, 0x8080, 0x00ff),         // claims one that does not
    ] {
        let mut area = vec![0u8; 108];
        area[0..2].copy_from_slice(&control.to_le_bytes());
        area[4..6].copy_from_slice(&status.to_le_bytes());
        area[8..10].copy_from_slice(&tags.to_le_bytes());
        for (n, register) in registers.iter().enumerate() {
            area[28 + 10 * n..38 + 10 * n].copy_from_slice(register);
        }
        let (mut environment, mut saved) = ([0u8; 28], [0u8; 108]);
        // SAFETY: loads and stores whole arrays; the state is initial afterwards.
        unsafe {
            asm!(
                "fninit", "frstor [{0}]", "fnstenv [{1}]", "frstor [{0}]", "fnsave [{2}]",
                in(reg) area.as_ptr(), in(reg) environment.as_mut_ptr(), in(reg) saved.as_mut_ptr(),
                out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _, out("st(4)") _, out("st(5)") _,
                out("st(6)") _, out("st(7)") _,
            );
        }
        let mut live = Live::new(core64());
        let core = &mut *live.0;
        poke(core, AT, &area);
        run(core, FRSTOR).expect("loads");
        core.set_gpr(RBX, AT + 0x200);
        run(core, FNSAVE).expect("saves");
        let ours = peek(core, AT + 0x200, 108);
        assert_eq!(ours[..12], saved[..12], "{control:x} {status:x} {tags:x}");
        assert_eq!(ours[12..26], [0; 14]);
        assert_eq!(ours[28..], saved[28..], "{control:x} {status:x} {tags:x}");
        // After FNSAVE: initial.
        core.set_gpr(RBX, AT + 0x300);
        run(core, FNSTENV).expect("saves");
        assert_eq!(
            peek(core, AT + 0x300, 12),
            [0x7f, 3, 0xff, 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]
        );

        // The environment alone, also in the 16-bit form, and the way back.
        core.set_gpr(RBX, AT);
        run(core, FRSTOR).expect("loads");
        core.set_gpr(RBX, AT + 0x400);
        run(core, FNSTENV).expect("saves");
        assert_eq!(peek(core, AT + 0x400, 12), environment[..12]);
        core.set_gpr(RBX, AT);
        run(core, FRSTOR).expect("loads");
        core.set_gpr(RBX, AT + 0x400);
        run(core, &[0x66, 0xd9, 0x33]).expect("saves 16");
        let short = peek(core, AT + 0x400, 6);
        assert_eq!(short[2..], [&environment[4..6], &environment[8..10]].concat());
    }
}

#[test]
fn a_waiting_exception_stops_the_loads() {
    let mut live = Live::new(core64());
    let core = &mut *live.0;
    let mut area = vec![0u8; 108];
    area[0] = 0x40;
    area[1] = 3;
    area[4] = 1;
    poke(core, AT, &area);
    run(core, FLDENV).expect("loads");
    let mf = exception(vector::MF, None);
    assert_eq!((run(core, FLDENV), run(core, FRSTOR)), (mf, mf));
    run(core, FNSAVE).expect("does not wait");
    run(core, FLDENV).expect("loads");
}

#[test]
fn mxcsr() {
    let mut live = Live::new(core64());
    let core = &mut *live.0;
    poke(core, AT, &0x1fa5u32.to_le_bytes());
    run(core, &[0x0f, 0xae, 0x13]).expect("ldmxcsr");
    core.set_gpr(RBX, AT + 8);
    run(core, &[0x0f, 0xae, 0x1b]).expect("stmxcsr");
    assert_eq!(peek(core, AT + 8, 4), 0x1fa5u32.to_le_bytes());
    poke(core, AT + 8, &0x1_1f80u32.to_le_bytes());
    assert_eq!(run(core, &[0x0f, 0xae, 0x13]), exception(vector::GP, Some(0)));
}
