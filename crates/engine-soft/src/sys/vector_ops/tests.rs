use wardian_cpu::bits::{cr0, vector};

use crate::core::Core;
use crate::sys::legacy::harness::{
    CODE, DEVICE, complete, core64, exception, page_fault, peek, poke, protect, run,
};
use crate::sys::legacy::operand::{RBX, RDI};

const AT: u64 = 0x2_0000;

fn set<const N: usize>(core: &mut Core, register: usize, words: [u32; N]) {
    let mut value = [0u8; 64];
    for (n, word) in words.into_iter().enumerate() {
        value[4 * n..4 * n + 4].copy_from_slice(&word.to_le_bytes());
    }
    core.ctx.get_mut().vec[register] = value;
}

fn get(core: &Core, register: usize) -> [u32; 8] {
    let value = core.c().vec[register];
    assert_eq!(value[32..], [0; 32]);
    std::array::from_fn(|n| {
        u32::from_le_bytes([value[4 * n], value[4 * n + 1], value[4 * n + 2], value[4 * n + 3]])
    })
}

const ON: u32 = 0x8000_0000;

/// vpgatherdd ymm0, [rbx + ymm1*4], ymm2
const GATHER_DD: &[u8] = &[0xc4, 0xe2, 0x6d, 0x90, 0x04, 0x8b];
/// vpgatherqd xmm0, [rbx + xmm1*8 + 8], xmm2
const GATHER_QD: &[u8] = &[0xc4, 0xe2, 0x69, 0x91, 0x44, 0xcb, 8];
/// vpgatherdq ymm0, [rbx + xmm1*8], ymm2
const GATHER_DQ: &[u8] = &[0xc4, 0xe2, 0xed, 0x90, 0x04, 0xcb];

fn table(core: &mut Core) {
    let words: Vec<u8> = (0..1024u32).flat_map(|n| (0x1000 + n).to_le_bytes()).collect();
    poke(core, AT, &words);
    core.set_gpr(RBX, AT + 0x800);
}

#[test]
fn gathers() {
    let mut core = core64();
    table(&mut core);
    set(&mut core, 0, [7; 8]);
    set(&mut core, 1, [0, 1, 2, (-1i32) as u32, 100, (-512i32) as u32, 6, 7]);
    set(&mut core, 2, [ON, ON, 0, ON, u32::MAX, ON, 0x7fff_ffff, ON]);
    run(&mut core, GATHER_DD).expect("gathers");
    assert_eq!(get(&core, 0), [0x1200, 0x1201, 7, 0x11ff, 0x1264, 0x1000, 7, 0x1207]);
    assert_eq!(get(&core, 2), [0; 8]);

    // Two elements: the rest of the destination is cleared.
    set(&mut core, 0, [7; 8]);
    set(&mut core, 1, [3, 0, u32::MAX, u32::MAX]);
    set(&mut core, 2, [ON, ON, ON, ON]);
    run(&mut core, GATHER_QD).expect("gathers");
    assert_eq!(get(&core, 0), [0x1208, 0x1200, 0, 0, 0, 0, 0, 0]);

    set(&mut core, 0, [7; 8]);
    set(&mut core, 1, [1, 2, 3, 4]);
    set(&mut core, 2, [0, ON, 0, 0, ON, 1, 0, ON]);
    run(&mut core, GATHER_DQ).expect("gathers");
    assert_eq!(get(&core, 0), [0x1202, 0x1203, 7, 7, 7, 7, 0x1208, 0x1209]);
}

#[test]
fn a_faulting_element_keeps_those_before_it() {
    let mut core = core64();
    table(&mut core);
    protect(&mut core, AT + 0x1000, 0);
    set(&mut core, 0, [7; 8]);
    set(&mut core, 1, [0, 600, 1, 601, 2, 3, 4, 5]);
    set(&mut core, 2, [ON, 0, ON, ON, ON, 0, ON, ON]);
    assert_eq!(run(&mut core, GATHER_DD), page_fault(4, AT + 0x800 + 601 * 4));
    assert_eq!(core.rip(), CODE);
    assert_eq!(get(&core, 0), [0x1200, 7, 0x1201, 7, 7, 7, 7, 7]);
    assert_eq!(get(&core, 2), [0, 0, 0, u32::MAX, u32::MAX, 0, u32::MAX, u32::MAX]);
    // What was done is not done again.
    poke(&core, AT + 0x800, &[0; 8]);
    protect(&mut core, AT + 0x1000, 7);
    poke(&core, AT + 0x800 + 601 * 4, &[9, 0, 0, 0]);
    run(&mut core, GATHER_DD).expect("goes on");
    assert_eq!(get(&core, 0), [0x1200, 7, 0x1201, 9, 0x1202, 7, 0x1204, 0x1205]);
}

#[test]
fn a_gather_from_a_device_asks_for_each_element_once() {
    let mut core = core64();
    core.set_gpr(RBX, DEVICE);
    set(&mut core, 1, [0, 1, 2, 3, 4, 5, 6, 7]);
    set(&mut core, 2, [ON, ON, 0, 0, 0, 0, 0, ON]);
    let mut next = 0;
    let seen = complete(&mut core, GATHER_DD, |_| {
        next += 1;
        next
    })
    .expect("gathers");
    let gpas: Vec<u64> = seen
        .iter()
        .map(|exit| match exit {
            wardian_cpu::Exit::MmioRead { gpa, size: 4 } => *gpa,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(gpas, [0x8000_0000, 0x8000_0004, 0x8000_001c]);
    assert_eq!(get(&core, 0), [1, 2, 0, 0, 0, 0, 0, 3]);
}

#[test]
fn gathers_refuse_equal_registers_and_a_switched_processor() {
    let mut core = core64();
    let ud = exception(vector::UD, None);
    // vpgatherdd ymm1, [rbx + ymm1*4], ymm2; ymm0, ymm1, ymm0; ymm0, ymm1, ymm1
    for insn in [
        [0xc4, 0xe2, 0x6d, 0x90, 0x0c, 0x8b],
        [0xc4, 0xe2, 0x7d, 0x90, 0x04, 0x8b],
        [0xc4, 0xe2, 0x75, 0x90, 0x04, 0x8b],
    ] {
        assert_eq!(run_any(&mut core, &insn), ud);
    }
    core.sys.cr0 |= cr0::TS;
    assert_eq!(run(&mut core, GATHER_DD), exception(vector::NM, None));
    core.sys.xcr0 = 3;
    assert_eq!(run(&mut core, GATHER_DD), ud);
}

/// As `run`, but the decoder may already refuse.
fn run_any(core: &mut Core, insn: &[u8]) -> Result<(), crate::trap::Exception> {
    let decoded = iced_x86::Decoder::with_ip(64, insn, CODE, iced_x86::DecoderOptions::NONE).decode();
    if decoded.is_invalid() { exception(vector::UD, None) } else { run(core, insn) }
}

#[test]
fn masked_moves_touch_only_what_the_mask_has() {
    let mut core = core64();
    protect(&mut core, AT + 0x1000, 0);
    core.set_gpr(RBX, AT + 0x1000 - 16);
    poke(&core, AT + 0x1000 - 16, &[1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0]);
    // vmaskmovps ymm0, ymm1, [rbx]
    let load: &[u8] = &[0xc4, 0xe2, 0x75, 0x2c, 0x03];
    set(&mut core, 0, [7; 8]);
    set(&mut core, 1, [ON, 0, ON, ON, 0, 0, 0, 0]);
    run(&mut core, load).expect("loads");
    assert_eq!(get(&core, 0), [1, 0, 3, 4, 0, 0, 0, 0]);
    set(&mut core, 0, [7; 8]);
    set(&mut core, 1, [ON, 0, 0, 0, 0, ON, 0, 0]);
    assert_eq!(run(&mut core, load), page_fault(4, AT + 0x1004));
    assert_eq!(get(&core, 0), [7; 8]);

    // vpmaskmovq [rbx], ymm1, ymm0: all or nothing.
    let store: &[u8] = &[0xc4, 0xe2, 0xf5, 0x8e, 0x03];
    set(&mut core, 0, [11, 12, 13, 14, 15, 16, 17, 18]);
    set(&mut core, 1, [0, 0, 0, ON, 0, 0, 0, ON]);
    assert_eq!(run(&mut core, store), page_fault(6, AT + 0x1008));
    assert_eq!(peek(&core, AT + 0x0ff8, 4), [3, 0, 0, 0]);
    set(&mut core, 1, [0, 0, 0, ON, 0, 0, 0, 0]);
    run(&mut core, store).expect("stores");
    assert_eq!(peek(&core, AT + 0x0ff0, 16), [1, 0, 0, 0, 2, 0, 0, 0, 13, 0, 0, 0, 14, 0, 0, 0]);
}

#[test]
fn bytes_by_mask() {
    let mut core = core64();
    protect(&mut core, AT + 0x1000, 5);
    core.set_gpr(RDI, AT + 0x1000 - 8);
    set(&mut core, 1, [0x0403_0201, 0x0807_0605, 0x0c0b_0a09, 0x100f_0e0d]);
    set(&mut core, 2, [0x8000_0080, 0x7f80_0000, 0, 0]);
    // maskmovdqu xmm1, xmm2
    let insn: &[u8] = &[0x66, 0x0f, 0xf7, 0xca];
    run(&mut core, insn).expect("stores");
    assert_eq!(peek(&core, AT + 0x0ff8, 8), [1, 0, 0, 4, 0, 0, 7, 0]);
    set(&mut core, 2, [0x8080_8080, 0, 0x80, 0]);
    assert_eq!(run(&mut core, insn), page_fault(7, AT + 0x1000));
    assert_eq!(peek(&core, AT + 0x0ff8, 8), [1, 0, 0, 4, 0, 0, 7, 0]);
}

#[test]
#[allow(unsafe_code)]
fn mmx_bytes_by_mask() {
    let mut core = core64();
    crate::fpu::enter(&mut core);
    let (data, mask) = (0x0807_0605_0403_0201u64, 0x8000_0000_0080_0080u64);
    // SAFETY: sets MMX registers, which the helper below reads as the guest's; `leave` resets them.
    unsafe {
        core::arch::asm!("movq mm1, {0}", "movq mm2, {1}", in(reg) data, in(reg) mask,
            out("mm0") _, out("mm1") _, out("mm2") _, out("mm3") _, out("mm4") _, out("mm5") _, out("mm6") _,
            out("mm7") _);
    }
    core.set_gpr(RDI, AT);
    let result = run(&mut core, &[0x0f, 0xf7, 0xca]);
    crate::fpu::store(&mut core);
    crate::fpu::leave(&mut core);
    result.expect("stores");
    assert_eq!(peek(&core, AT, 8), [1, 0, 3, 0, 0, 0, 0, 8]);
    assert_eq!(core.c().xsave[4], 0xff);
    assert_eq!(core.c().xsave[48..56], data.to_le_bytes());
}
