//! AVX-512 through the engine's public face: small programs in 64-bit mode.
#![allow(missing_docs)]

use std::sync::Arc;

use iced_x86::code_asm::*;
use wardian_cpu::bits::{cr0, cr4, efer};
use wardian_cpu::{Answer, CpuModel, CpuState, Engine, Exit, Feature, Segment, Vcpu};
use wardian_engine_soft::{Options, SoftEngine};
use wardian_irq::Quiet;
use wardian_memory::{Gpa, GuestMemory};
use wardian_time::{Nanos, TimeBase};

const CODE: u64 = 0x10_0000;
const STACK: u64 = 0x20_0000;
/// #PF arrives here with CR2 in RAX, the error code in RDX and the faulting RIP in RBX, and halts.
const HANDLER: u64 = 0x18_0000;
const GDT: u64 = 0x5000;
const IDT: u64 = 0x6000;
/// The second MiB beyond the first two is mapped by 4 KiB pages; this one is missing.
const HOLE: u64 = 0x40_3000;
/// Read-only.
const FROZEN: u64 = 0x40_5000;
const DATA: u64 = 0x30_0000;
/// Not RAM.
const DEVICE: u64 = 0x3000_0000;

struct Guest {
    mem: GuestMemory,
    vcpu: Box<dyn Vcpu>,
}

fn state() -> CpuState {
    let mut state = CpuState::reset();
    let data = Segment { selector: 0x10, base: 0, limit: u32::MAX, rights: 0xc093 };
    state.segments = [data; 6];
    state.segments[CpuState::CS] = Segment { selector: 8, base: 0, limit: u32::MAX, rights: 0xa09b };
    state.cr0 = cr0::PE | cr0::PG | cr0::WP | cr0::NE | cr0::ET;
    state.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
    state.xcr0 = 0xe7;
    state.cr3 = 0x1000;
    state.efer = efer::LME | efer::LMA | efer::NXE;
    state.rip = CODE;
    state.gpr[CpuState::RSP] = STACK;
    state.gdtr.base = GDT;
    state.gdtr.limit = 0x17;
    state.idtr.base = IDT;
    state.idtr.limit = 0xfff;
    state
}

/// A guest about to run `program`; `None` (and a word why) where the host has no AVX-512.
fn guest(program: impl FnOnce(&mut CodeAssembler)) -> Option<Guest> {
    let time = TimeBase::manual(Nanos(0));
    let offer = SoftEngine::offer(&time);
    if !offer.avx512 {
        eprintln!("skipped, because the host has no AVX-512");
        return None;
    }
    let mem = GuestMemory::new(64 << 20).unwrap();
    let put = |at: u64, value: u64| mem.write(Gpa(at), &value.to_le_bytes()).unwrap();
    let mut a = CodeAssembler::new(64).unwrap();
    a.set_prefer_vex(false);
    program(&mut a);
    mem.write(Gpa(CODE), &a.assemble(CODE).unwrap()).unwrap();
    let mut a = CodeAssembler::new(64).unwrap();
    a.pop(rdx).unwrap();
    a.pop(rbx).unwrap();
    a.mov(rax, cr2).unwrap();
    a.hlt().unwrap();
    mem.write(Gpa(HANDLER), &a.assemble(HANDLER).unwrap()).unwrap();
    put(0x1000, 0x2003);
    put(0x2000, 0x3003);
    for n in 0..512u64 {
        put(0x3000 + n * 8, n << 21 | 0x83);
        put(0x4000 + n * 8, (0x40_0000 + n * 4096) | 3);
    }
    put(0x3000 + 2 * 8, 0x4003);
    put(0x4000 + 3 * 8, 0);
    put(0x4000 + 5 * 8, FROZEN | 1);
    put(GDT + 8, 0x00af_9b00_0000_ffff);
    put(GDT + 16, 0x00cf_9300_0000_ffff);
    put(IDT + 14 * 16, (HANDLER & 0xffff) | 8 << 16 | 0x8e00 << 32 | (HANDLER >> 16) << 48);
    put(IDT + 14 * 16 + 8, 0);
    for n in 0..64u64 {
        put(DATA + n * 8, 0x0101_0101_0101_0101 * n);
    }
    let model = Arc::new(CpuModel::host("host", &offer).unwrap());
    assert!(model.has(Feature::Avx512f) && model.has(Feature::Avx512vl));
    let engine = SoftEngine::new(mem.clone(), time, &Options { cpus: 1 }).unwrap();
    let mut vcpu = engine.create_vcpu(0, &model, Arc::new(Quiet)).unwrap();
    vcpu.set_state(&state()).unwrap();
    Some(Guest { mem, vcpu })
}

impl Guest {
    fn run_to_halt(&mut self) -> CpuState {
        assert_eq!(self.vcpu.run(Answer::None).unwrap(), Exit::Halt);
        self.vcpu.state()
    }
    fn bytes<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut out = [0; N];
        self.mem.read(Gpa(at), &mut out).unwrap();
        out
    }
    fn u32s<const N: usize>(&self, at: u64) -> [u32; N] {
        std::array::from_fn(|n| u32::from_le_bytes(self.bytes(at + n as u64 * 4)))
    }
    fn fill(&self, at: u64, bytes: &[u8]) {
        self.mem.write(Gpa(at), bytes).unwrap();
    }
}

/// ZMM0 = 0, 1, ... as doublewords.
fn count_up(a: &mut CodeAssembler) {
    a.mov(eax, DATA as u32 + 0x1000).unwrap();
    for n in 0..16 {
        a.mov(dword_ptr(rax + n * 4), n).unwrap();
    }
    a.vmovdqu32(zmm0, zmmword_ptr(rax)).unwrap();
}

fn set_mask(a: &mut CodeAssembler, k: AsmRegisterK, value: u64) {
    a.mov(r13, value).unwrap();
    a.kmovq(k, r13).unwrap();
}

#[test]
fn arithmetic_masks_zeroing_broadcast_and_high_registers() {
    let Some(mut g) = guest(|a| {
        count_up(a);
        set_mask(a, k3, 0x00ff);
        a.mov(r12d, DATA as u32 + 0x2000).unwrap();
        a.mov(dword_ptr(r12), 100).unwrap();
        a.vpaddd(zmm31.k3(), zmm0, zmm0).unwrap();
        a.vmovdqu32(zmmword_ptr(r12 + 0x40), zmm31).unwrap();
        a.vpaddd(zmm17.k3().z(), zmm0, dword_bcst(r12)).unwrap();
        a.vmovdqu32(zmmword_ptr(r12 + 0x80), zmm17).unwrap();
        a.vpternlogd(zmm20, zmm20, zmm20, 0xff).unwrap();
        a.vmovdqu32(zmmword_ptr(r12 + 0xc0).k3(), zmm20).unwrap();
        a.vpcmpud(k5.k3(), zmm0, zmm17, 1).unwrap();
        a.kmovw(r15d, k5).unwrap();
        a.kortestw(k5, k5).unwrap();
        a.setz(bl).unwrap();
        a.hlt().unwrap();
    }) else {
        return;
    };
    let s = g.run_to_halt();
    let at = DATA + 0x2000;
    assert_eq!(g.u32s::<16>(at + 0x40), std::array::from_fn(|n| if n < 8 { 2 * n as u32 } else { 0 }));
    assert_eq!(g.u32s::<16>(at + 0x80), std::array::from_fn(|n| if n < 8 { 100 + n as u32 } else { 0 }));
    assert_eq!(g.u32s::<16>(at + 0xc0), std::array::from_fn(|n| if n < 8 { u32::MAX } else { 0 }));
    assert_eq!((s.gpr[15], s.gpr[3] & 0xff), (0xff, 0));
}

#[test]
fn spilled_general_registers() {
    let Some(mut g) = guest(|a| {
        a.mov(r14d, DATA as u32 + 0x1000).unwrap();
        a.mov(r12, 0x1122_3344_5566_7788u64).unwrap();
        a.vpbroadcastq(zmm29, r12).unwrap();
        a.vmovdqa64(zmmword_ptr(r14), zmm29).unwrap();
        a.vmovq(r13, xmm29).unwrap();
        a.vcvtusi2sd(xmm18, xmm18, r15d).unwrap();
        a.mov(r15d, 7).unwrap();
        a.vcvtusi2sd(xmm18, xmm18, r15d).unwrap();
        a.vmovsd(qword_ptr(r14 + 64), xmm18).unwrap();
        a.vcvtsd2usi(r12, qword_ptr(r14 + 64)).unwrap();
        a.vpextrd(dword_ptr(r14 + 72), xmm29, 1).unwrap();
        a.vpextrd(r15d, xmm29, 1).unwrap();
        a.stc().unwrap();
        a.vmovdqu64(zmm1, zmmword_ptr(r14 + r12 * 8 - 56)).unwrap();
        a.adc(r12, 0).unwrap();
        a.mov(rbp, 0xabcdu64).unwrap();
        a.kmovq(k7, rbp).unwrap();
        a.kmovq(qword_ptr(r14 + 80), k7).unwrap();
        a.kmovq(rsi, k7).unwrap();
        a.hlt().unwrap();
    }) else {
        return;
    };
    let s = g.run_to_halt();
    assert_eq!(s.gpr[13], 0x1122_3344_5566_7788);
    assert_eq!((s.gpr[12], s.gpr[15], s.gpr[6]), (8, 0x1122_3344, 0xabcd));
    let at = DATA + 0x1000;
    assert_eq!(g.bytes::<64>(at), *[0x1122_3344_5566_7788u64.to_le_bytes(); 8].as_flattened());
    assert_eq!(g.u32s::<1>(at + 72), [0x1122_3344]);
    assert_eq!(g.u32s::<2>(at + 80), [0xabcd, 0]);
}

#[test]
fn masked_off_elements_beside_a_hole_do_not_fault() {
    let edge = HOLE - 16;
    let Some(mut g) = guest(|a| {
        a.mov(r12, edge).unwrap();
        set_mask(a, k1, 0xffff);
        a.vmovdqu8(zmm1.k1().z(), zmmword_ptr(r12)).unwrap();
        a.vmovdqu8(zmmword_ptr(r12).k1(), zmm1).unwrap();
        set_mask(a, k2, 0x7);
        a.vpaddb(zmm2.k1().z(), zmm1, zmmword_ptr(r12)).unwrap();
        a.vpaddd(zmm3.k2().z(), zmm3, zmmword_ptr(r12)).unwrap();
        a.vmovdqu8(zmmword_ptr(r12).k1(), zmm2).unwrap();
        a.vmovdqu32(zmmword_ptr(DATA as i32 + 0x1000), zmm3).unwrap();
        // Nothing at all is read from the hole and from an address that is not canonical.
        a.kxorq(k3, k3, k3).unwrap();
        a.vmovups(zmm4.k3(), zmmword_ptr(r12 + 16)).unwrap();
        a.vmovups(zmmword_ptr(r12 + 16).k3(), zmm4).unwrap();
        a.mov(r13, 0x8000_0000_0000_0000u64).unwrap();
        a.vpaddd(zmm4.k3(), zmm4, dword_bcst(r13)).unwrap();
        // The other side: the first three quarters are in the hole.
        a.mov(r12, HOLE + 0x1000 - 48).unwrap();
        set_mask(a, k4, 0xf000);
        a.vmovups(zmmword_ptr(r12).k4(), zmm4).unwrap();
        a.vmovups(zmm5.k4().z(), zmmword_ptr(r12)).unwrap();
        a.vmovups(zmmword_ptr(DATA as i32 + 0x1040), zmm5).unwrap();
        a.hlt().unwrap();
    }) else {
        return;
    };
    g.fill(edge, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]);
    g.fill(HOLE + 0x1000, &[0x55; 64]);
    g.run_to_halt();
    assert_eq!(g.bytes::<16>(edge), std::array::from_fn(|n| 2 * (n as u8 + 1)));
    let words = [0x0403_0201u32, 0x0807_0605, 0x0c0b_0a09];
    assert_eq!(g.u32s::<4>(DATA + 0x1000), [words[0], words[1], words[2], 0]);
    assert_eq!(g.bytes::<17>(HOLE + 0x1000), std::array::from_fn(|n| if n < 16 { 0 } else { 0x55 }));
    assert_eq!(g.bytes::<64>(DATA + 0x1040), [0; 64]);
}

/// Runs `program`, which must fault; (CR2, error code, RIP - CODE) and the guest.
fn fault(program: impl FnOnce(&mut CodeAssembler)) -> Option<((u64, u64), Guest, CpuState)> {
    let mut g = guest(program)?;
    let s = g.run_to_halt();
    Some(((s.gpr[0], s.gpr[2]), g, s))
}

#[test]
fn active_elements_beside_a_hole_fault_exactly() {
    let edge = HOLE - 16;
    let load = |a: &mut CodeAssembler| {
        a.mov(r12, edge).unwrap();
        set_mask(a, k1, 1 << 40 | 3);
        a.vmovdqu8(zmm1.k1().z(), zmmword_ptr(r12)).unwrap();
        a.hlt().unwrap();
    };
    let Some((seen, _, _)) = fault(load) else { return };
    assert_eq!(seen, (HOLE + 24, 0));
    let store = |a: &mut CodeAssembler| {
        a.mov(r12, edge).unwrap();
        a.vpternlogd(zmm20, zmm20, zmm20, 0xff).unwrap();
        set_mask(a, k1, 0x70ff);
        a.vmovdqu32(zmmword_ptr(r12).k1(), zmm20).unwrap();
        a.hlt().unwrap();
    };
    let (seen, g, _) = fault(store).unwrap();
    assert_eq!(seen, (HOLE + 43, 2)); // the last byte of the last active element, as on processors
    assert_eq!(g.bytes::<16>(edge), [0; 16]);
    // A page that may only be read; the elements before it are fine.
    let frozen = |a: &mut CodeAssembler| {
        a.mov(r12, FROZEN - 32).unwrap();
        a.vpternlogd(zmm20, zmm20, zmm20, 0xff).unwrap();
        set_mask(a, k1, 0xff);
        a.vmovdqu32(zmm3, zmmword_ptr(r12)).unwrap();
        a.vmovdqu32(zmmword_ptr(r12).k1(), zmm20).unwrap();
        set_mask(a, k1, 0x4_00);
        a.vmovdqu32(zmmword_ptr(r12).k1(), zmm20).unwrap();
        a.hlt().unwrap();
    };
    let (seen, g, _) = fault(frozen).unwrap();
    assert_eq!(seen, (FROZEN + 11, 3));
    assert_eq!(g.bytes::<33>(FROZEN - 32), std::array::from_fn(|n| if n < 32 { 0xff } else { 0 }));
    // A permutation uses all of its operand whatever the mask.
    let table = |a: &mut CodeAssembler| {
        a.mov(r12, edge).unwrap();
        set_mask(a, k1, 1);
        a.vpermd(zmm1.k1(), zmm2, zmmword_ptr(r12)).unwrap();
        a.hlt().unwrap();
    };
    assert_eq!(fault(table).unwrap().0, (HOLE, 0));
}

#[test]
fn devices_see_only_what_the_mask_has() {
    let Some(mut g) = guest(|a| {
        a.mov(r12, DEVICE).unwrap();
        set_mask(a, k1, 0b1001);
        a.vmovdqu32(xmm1.k1().z(), xmmword_ptr(r12)).unwrap();
        a.vmovdqu32(xmmword_ptr(r12 + 0x10).k1(), xmm1).unwrap();
        a.hlt().unwrap();
    }) else {
        return;
    };
    let v = &mut g.vcpu;
    assert_eq!(v.run(Answer::None).unwrap(), Exit::MmioRead { gpa: DEVICE, size: 4 });
    assert_eq!(v.run(Answer::Data(5)).unwrap(), Exit::MmioRead { gpa: DEVICE + 12, size: 4 });
    assert_eq!(v.run(Answer::Data(7)).unwrap(), Exit::MmioWrite { gpa: DEVICE + 0x10, size: 4, data: 5 });
    assert_eq!(v.run(Answer::None).unwrap(), Exit::MmioWrite { gpa: DEVICE + 0x1c, size: 4, data: 7 });
    assert_eq!(v.run(Answer::None).unwrap(), Exit::Halt);
}

#[test]
fn gathers_and_scatters() {
    let Some(mut g) = guest(|a| {
        count_up(a);
        a.mov(r12, DATA).unwrap();
        set_mask(a, k1, 0x00f3);
        a.vpternlogd(zmm16, zmm16, zmm16, 0xff).unwrap();
        a.vpgatherdd(zmm16.k1(), dword_ptr(r12 + zmm0 * 8)).unwrap();
        a.kmovq(rdi, k1).unwrap();
        a.vmovdqu32(zmmword_ptr(r12 + 0x2000), zmm16).unwrap();
        set_mask(a, k2, 0x8005);
        a.vpscatterdd(dword_ptr(r12 + zmm0 * 4 + 0x2040).k2(), zmm0).unwrap();
        a.kmovq(rsi, k2).unwrap();
        set_mask(a, k3, 0xff);
        a.vpmovzxdq(zmm18, ymm0).unwrap();
        a.vpternlogd(zmm19, zmm19, zmm19, 0xff).unwrap();
        a.vpgatherqd(ymm19.k3(), dword_ptr(r12 + zmm18 * 8)).unwrap();
        a.vmovdqu32(zmmword_ptr(r12 + 0x2080), zmm19).unwrap();
        a.hlt().unwrap();
    }) else {
        return;
    };
    let s = g.run_to_halt();
    assert_eq!((s.gpr[7], s.gpr[6]), (0, 0));
    let chosen = |n: usize| 0x00f3 >> n & 1 != 0;
    let element = |n: usize| 0x0101_0101 * n as u32;
    assert_eq!(
        g.u32s::<16>(DATA + 0x2000),
        std::array::from_fn(|n| if chosen(n) { element(n) } else { u32::MAX })
    );
    let mut expected = [0; 16];
    (expected[2], expected[15]) = (2, 15);
    assert_eq!(g.u32s::<16>(DATA + 0x2040), expected);
    assert_eq!(g.u32s::<16>(DATA + 0x2080), std::array::from_fn(|n| if n < 8 { element(n) } else { 0 }));
}

#[test]
fn a_faulting_element_keeps_those_before_it() {
    let gather = |a: &mut CodeAssembler| {
        count_up(a);
        a.mov(r12, HOLE - 0x1000 * 3).unwrap();
        a.vpslld(zmm1, zmm0, 12).unwrap();
        a.vpternlogd(zmm16, zmm16, zmm16, 0xff).unwrap();
        set_mask(a, k1, 0b1_1101);
        a.vpgatherdd(zmm16.k1(), dword_ptr(r12 + zmm1)).unwrap();
        a.hlt().unwrap();
    };
    let Some((seen, g, s)) = fault(gather) else { return };
    assert_eq!(seen, (HOLE, 0));
    assert_eq!(image_mask(&s, 1), 0b1_1000);
    assert_eq!(
        image_zmm(&s, 16)[..20],
        [0, 0, 0, 0, 255, 255, 255, 255, 0, 0, 0, 0, 255, 255, 255, 255, 255, 255, 255, 255]
    );
    drop(g);
    let scatter = |a: &mut CodeAssembler| {
        count_up(a);
        a.mov(r12, HOLE - 0x1000 * 3).unwrap();
        a.vpslld(zmm1, zmm0, 12).unwrap();
        a.vpternlogd(zmm16, zmm16, zmm16, 0xff).unwrap();
        set_mask(a, k1, 0b1_1101);
        a.vpscatterdd(dword_ptr(r12 + zmm1).k1(), zmm16).unwrap();
        a.hlt().unwrap();
    };
    let (seen, g, s) = fault(scatter).unwrap();
    assert_eq!(seen, (HOLE, 2));
    assert_eq!(image_mask(&s, 1), 0b1_1000);
    assert_eq!(g.u32s::<1>(HOLE - 0x3000), [u32::MAX]);
    assert_eq!(g.u32s::<1>(HOLE - 0x2000), [0]);
    assert_eq!(g.u32s::<1>(HOLE - 0x1000), [u32::MAX]);
    assert_eq!(g.u32s::<1>(HOLE + 0x1000), [0]);
}

#[test]
fn compressing_stores_and_expanding_loads() {
    let Some(mut g) = guest(|a| {
        count_up(a);
        set_mask(a, k1, 0b1010_0000_0001_0010);
        a.mov(r12, HOLE - 16).unwrap(); // exactly four elements fit
        a.vpcompressd(zmmword_ptr(r12).k1(), zmm0).unwrap();
        a.vpexpandd(zmm17.k1().z(), zmmword_ptr(r12)).unwrap();
        a.vmovdqu32(zmmword_ptr(DATA as i32 + 0x2000), zmm17).unwrap();
        a.vpcompressd(zmm18.k1().z(), zmm0).unwrap();
        a.vmovdqu32(zmmword_ptr(DATA as i32 + 0x2040), zmm18).unwrap();
        a.hlt().unwrap();
    }) else {
        return;
    };
    g.run_to_halt();
    assert_eq!(g.u32s::<4>(HOLE - 16), [1, 4, 13, 15]);
    let kept = [1, 4, 13, 15];
    assert_eq!(
        g.u32s::<16>(DATA + 0x2000),
        std::array::from_fn(|n| if kept.contains(&n) { n as u32 } else { 0 })
    );
    assert_eq!(g.u32s::<5>(DATA + 0x2040), [1, 4, 13, 15, 0]);
}

fn layout(component: u32) -> usize {
    std::arch::x86_64::__cpuid_count(0xd, component).ebx as usize
}
fn image_mask(s: &CpuState, n: usize) -> u64 {
    let at = layout(5) + n * 8;
    u64::from_le_bytes(s.xsave[at..at + 8].try_into().unwrap())
}
fn image_zmm(s: &CpuState, n: usize) -> [u8; 64] {
    let mut out = [0; 64];
    if n < 16 {
        out[..16].copy_from_slice(&s.xsave[160 + n * 16..176 + n * 16]);
        out[16..32].copy_from_slice(&s.xsave[576 + n * 16..592 + n * 16]);
        out[32..].copy_from_slice(&s.xsave[layout(6) + n * 32..layout(6) + n * 32 + 32]);
    } else {
        let at = layout(7) + (n - 16) * 64;
        out.copy_from_slice(&s.xsave[at..at + 64]);
    }
    out
}

const ZMM: [AsmRegisterZmm; 32] = [
    zmm0, zmm1, zmm2, zmm3, zmm4, zmm5, zmm6, zmm7, zmm8, zmm9, zmm10, zmm11, zmm12, zmm13, zmm14, zmm15,
    zmm16, zmm17, zmm18, zmm19, zmm20, zmm21, zmm22, zmm23, zmm24, zmm25, zmm26, zmm27, zmm28, zmm29, zmm30,
    zmm31,
];
const MASKS: [AsmRegisterK; 8] = [k0, k1, k2, k3, k4, k5, k6, k7];

fn load_all(a: &mut CodeAssembler) {
    for (n, z) in ZMM.into_iter().enumerate() {
        a.mov(eax, 0x100 + n as u32).unwrap();
        a.vpbroadcastd(z, eax).unwrap();
    }
    for (n, k) in MASKS.into_iter().enumerate() {
        set_mask(a, k, 0x1000_0000_0000_0000 * (n as u64 + 1) + n as u64);
    }
}

fn check_all(s: &CpuState) {
    for n in 0..32 {
        assert_eq!(image_zmm(s, n), *[(0x100 + n as u32).to_le_bytes(); 16].as_flattened(), "zmm{n}");
    }
    for n in 0..8 {
        assert_eq!(image_mask(s, n), 0x1000_0000_0000_0000 * (n as u64 + 1) + n as u64, "k{n}");
    }
}

#[test]
fn xsave_and_xrstor_carry_everything() {
    for compact in [false, true] {
        let Some(mut g) = guest(|a| {
            load_all(a);
            a.mov(eax, 0xe7).unwrap();
            a.xor(edx, edx).unwrap();
            a.mov(r12, DATA + 0x4000).unwrap();
            if compact {
                a.xsavec(ptr(r12)).unwrap();
            } else {
                a.xsave(ptr(r12)).unwrap();
            }
            for z in ZMM {
                a.vpxorq(z, z, z).unwrap();
            }
            for k in MASKS {
                a.kxorq(k, k, k).unwrap();
            }
            a.xrstor(ptr(r12)).unwrap();
            a.hlt().unwrap();
        }) else {
            return;
        };
        let s = g.run_to_halt();
        check_all(&s);
        assert_eq!(s.xsave[512] & 0xe0, 0xe0);
        assert_eq!(g.u32s::<1>(DATA + 0x4000 + 512)[0] & 0xe0, 0xe0);
    }
}

#[test]
fn xrstor_of_nothing_clears() {
    let Some(mut g) = guest(|a| {
        load_all(a);
        a.mov(eax, 0xe0).unwrap();
        a.xor(edx, edx).unwrap();
        a.xrstor(ptr(DATA as i32 + 0x4000)).unwrap();
        a.vmovdqu64(zmmword_ptr(DATA as i32 + 0x5000), zmm1).unwrap();
        a.hlt().unwrap();
    }) else {
        return;
    };
    let s = g.run_to_halt();
    assert_eq!(s.xsave[512] & 0xe0, 0);
    for n in 0..16 {
        assert_eq!(image_zmm(&s, n)[32..], [0; 32]);
        assert_eq!(image_zmm(&s, n)[..4], (0x100 + n as u32).to_le_bytes());
        assert_eq!(image_zmm(&s, n + 16), [0; 64]);
    }
    assert_eq!(g.u32s::<9>(DATA + 0x5000), [0x101, 0x101, 0x101, 0x101, 0x101, 0x101, 0x101, 0x101, 0]);
}

#[test]
fn state_goes_out_and_comes_back() {
    let store_all = |a: &mut CodeAssembler| {
        a.hlt().unwrap();
        // The second run: code without AVX-512 that leaves often, then all registers to memory.
        a.mov(r12, DATA + 0x4000).unwrap();
        a.mov(ecx, 50).unwrap();
        let mut top = a.create_label();
        a.set_label(&mut top).unwrap();
        a.pushfq().unwrap();
        a.popfq().unwrap();
        a.add(dword_ptr(r12 + rcx * 8 + 0x1000), ecx).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(top).unwrap();
        for (n, z) in ZMM.into_iter().enumerate() {
            a.vmovdqu64(zmmword_ptr(r12 + n * 64), z).unwrap();
        }
        for (n, k) in MASKS.into_iter().enumerate() {
            a.kmovq(qword_ptr(r12 + 2048 + n * 8), k).unwrap();
        }
        a.hlt().unwrap();
    };
    let Some(mut g) = guest(|a| {
        load_all(a);
        store_all(a);
    }) else {
        return;
    };
    let s = g.run_to_halt();
    check_all(&s);
    let mut fresh = guest(|a| {
        load_all(a);
        store_all(a);
    })
    .unwrap();
    fresh.vcpu.set_state(&s).unwrap();
    let back = fresh.vcpu.state();
    assert_eq!(back.xsave[..2688], s.xsave[..2688]);
    let mut s = s;
    s.activity = wardian_cpu::Activity::Running;
    fresh.vcpu.set_state(&s).unwrap();
    let end = fresh.run_to_halt();
    check_all(&end);
    for n in 0..32u64 {
        assert_eq!(fresh.u32s::<16>(DATA + 0x4000 + n * 64), [0x100 + n as u32; 16], "zmm{n}");
    }
}

#[test]
fn without_xcr0_it_is_undefined() {
    for (xcr0, off) in [(7, 0), (0xe7, cr4::OSXSAVE)] {
        let Some(mut g) = guest(|a| {
            a.vpaddd(zmm1, zmm2, zmm3).unwrap();
            a.hlt().unwrap();
        }) else {
            return;
        };
        let mut s = state();
        s.xcr0 = xcr0;
        s.cr4 &= !off;
        // #UD has no gate: #NP, then a double fault, then shutdown.
        g.vcpu.set_state(&s).unwrap();
        assert_eq!(g.vcpu.run(Answer::None).unwrap(), Exit::Shutdown);
    }
}

#[test]
fn narrow_code_clears_what_is_above() {
    // 256-bit writes clear bits 256-511 whatever the registers held, across exits and slow accesses.
    let Some(mut g) = guest(|a| {
        load_all(a);
        a.vmovdqa32(ymm3, ymm4).unwrap();
        a.vpaddd(ymm5, ymm5, ymm6).unwrap();
        a.vmovdqa32(ymm21, ymm22).unwrap();
        a.in_(al, 0x60).unwrap();
        a.vmovdqu64(zmmword_ptr(DATA as i32 + 0x5000), zmm21).unwrap();
        a.hlt().unwrap();
    }) else {
        return;
    };
    assert_eq!(g.vcpu.run(Answer::None).unwrap(), Exit::PortIn { port: 0x60, size: 1 });
    assert_eq!(g.vcpu.run(Answer::Data(1)).unwrap(), Exit::Halt);
    let s = g.vcpu.state();
    for (n, value) in [(3, 0x104u32), (5, 0x105 + 0x106), (21, 0x116)] {
        let mut expected = [0u8; 64];
        expected[..32].copy_from_slice([value.to_le_bytes(); 8].as_flattened());
        assert_eq!(image_zmm(&s, n), expected, "zmm{n}");
    }
    assert_eq!(g.u32s::<9>(DATA + 0x5000)[7..], [0x116, 0]);
}
