//! The check mode: programs run as always, and every superblock is compared with its instructions one by one.
#![allow(missing_docs)]

use std::sync::Arc;

use iced_x86::code_asm::*;
use wardian_cpu::bits::{cr0, cr4, efer};
use wardian_cpu::{Answer, CpuModel, CpuState, Engine, Exit, Segment};
use wardian_engine_soft::{Options, SoftEngine};
use wardian_irq::Quiet;
use wardian_memory::{Gpa, GuestMemory};
use wardian_time::{Nanos, TimeBase};

const CODE: u64 = 0x10_0000;
const STACK: u64 = 0x20_0000;

#[test]
fn a_program_passes_and_each_of_its_blocks_was_compared() {
    let mem = GuestMemory::new(64 << 20).unwrap();
    let mut a = CodeAssembler::new(64).unwrap();
    // Flags over a store, a store that rewrites an instruction ahead, vectors, x87, calls.
    let (mut top, mut sub, mut patched) = (a.create_label(), a.create_label(), a.create_label());
    a.xor(eax, eax).unwrap();
    a.mov(ecx, 40).unwrap();
    a.cvtsi2sd(xmm1, ecx).unwrap();
    a.fld1().unwrap();
    a.set_label(&mut top).unwrap();
    a.add(rax, rcx).unwrap();
    a.mov(qword_ptr(rsp - 64), rax).unwrap();
    a.adc(rax, 0).unwrap();
    a.addsd(xmm1, xmm1).unwrap();
    a.movups(xmmword_ptr(rsp - 48), xmm1).unwrap();
    a.call(sub).unwrap();
    a.lea(rdx, qword_ptr(patched)).unwrap();
    a.mov(byte_ptr(rdx + 1), cl).unwrap();
    a.set_label(&mut patched).unwrap();
    a.mov(ebx, 0).unwrap();
    a.dec(rcx).unwrap();
    a.jnz(top).unwrap();
    a.hlt().unwrap();
    a.set_label(&mut sub).unwrap();
    a.fadd_2(st0, st0).unwrap();
    a.push(rcx).unwrap();
    a.pop(rsi).unwrap();
    a.ret().unwrap();
    mem.write(Gpa(CODE), &a.assemble(CODE).unwrap()).unwrap();
    mem.write(Gpa(0x1000), &0x2003u64.to_le_bytes()).unwrap();
    mem.write(Gpa(0x2000), &0x3003u64.to_le_bytes()).unwrap();
    for n in 0..512u64 {
        mem.write(Gpa(0x3000 + n * 8), &(n << 21 | 0x83).to_le_bytes()).unwrap();
    }
    let time = TimeBase::manual(Nanos(0));
    let model = Arc::new(CpuModel::host("host", &SoftEngine::offer(&time)).unwrap());
    let engine = SoftEngine::checking(mem, time, &Options { cpus: 1 }).unwrap();
    let mut vcpu = engine.create_vcpu(0, &model, Arc::new(Quiet)).unwrap();
    let mut state = CpuState::reset();
    state.segments = [Segment { selector: 0x10, base: 0, limit: u32::MAX, rights: 0xc093 }; 6];
    state.segments[CpuState::CS] = Segment { selector: 8, base: 0, limit: u32::MAX, rights: 0xa09b };
    state.cr0 = cr0::PE | cr0::PG | cr0::WP | cr0::NE | cr0::ET;
    state.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT;
    state.cr3 = 0x1000;
    state.efer = efer::LME | efer::LMA | efer::NXE;
    state.rip = CODE;
    state.gpr[CpuState::RSP] = STACK;
    vcpu.set_state(&state).unwrap();
    assert_eq!(vcpu.run(Answer::None).unwrap(), Exit::Halt);
    let end = vcpu.state();
    assert_eq!((end.gpr[0], end.gpr[3], end.gpr[6]), (820, 1, 1));
    let counters = vcpu.counters();
    let count = |name: &str| counters.iter().find(|(n, _)| *n == name).map_or(0, |(_, count)| *count);
    assert!(count("checked_runs") >= 6, "{counters:?}");
    assert_eq!(count("checked_disturbed"), 0);
}

#[test]
fn it_is_for_one_processor() {
    let mem = GuestMemory::new(1 << 20).unwrap();
    assert!(SoftEngine::checking(mem, TimeBase::manual(Nanos(0)), &Options { cpus: 2 }).is_err());
}
