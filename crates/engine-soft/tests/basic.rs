//! The engine through its public face: small programs in 64-bit mode.
#![allow(missing_docs)]

use std::sync::Arc;

use iced_x86::code_asm::*;
use wardian_cpu::bits::{cr0, cr4, efer};
use wardian_cpu::{Answer, CpuModel, CpuState, Engine, Exit, Segment, Vcpu};
use wardian_engine_soft::{Options, SoftEngine};
use wardian_irq::Quiet;
use wardian_memory::{Gpa, GuestMemory};
use wardian_time::{Nanos, TimeBase};

const CODE: u64 = 0x10_0000;
const STACK: u64 = 0x20_0000;

struct Guest {
    mem: GuestMemory,
    vcpu: Box<dyn Vcpu>,
}

/// A guest in 64-bit mode with the first GiB mapped to itself, about to run `program`.
fn guest(program: impl FnOnce(&mut CodeAssembler)) -> Guest {
    let mem = GuestMemory::new(64 << 20).unwrap();
    let mut a = CodeAssembler::new(64).unwrap();
    program(&mut a);
    mem.write(Gpa(CODE), &a.assemble(CODE).unwrap()).unwrap();
    mem.write(Gpa(0x1000), &0x2003u64.to_le_bytes()).unwrap();
    mem.write(Gpa(0x2000), &0x3003u64.to_le_bytes()).unwrap();
    for n in 0..512u64 {
        mem.write(Gpa(0x3000 + n * 8), &(n << 21 | 0x83).to_le_bytes()).unwrap();
    }
    let time = TimeBase::manual(Nanos(0));
    let model = Arc::new(CpuModel::host("host", &SoftEngine::offer(&time)).unwrap());
    let engine = SoftEngine::new(mem.clone(), time, &Options { cpus: 1 }).unwrap();
    let mut vcpu = engine.create_vcpu(0, &model, Arc::new(Quiet)).unwrap();
    let mut state = CpuState::reset();
    let data = Segment { selector: 0x10, base: 0, limit: u32::MAX, rights: 0xc093 };
    state.segments = [data; 6];
    state.segments[CpuState::CS] = Segment { selector: 8, base: 0, limit: u32::MAX, rights: 0xa09b };
    state.cr0 = cr0::PE | cr0::PG | cr0::WP | cr0::NE | cr0::ET;
    state.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT;
    state.cr3 = 0x1000;
    state.efer = efer::LME | efer::LMA | efer::NXE;
    state.rip = CODE;
    state.gpr[CpuState::RSP] = STACK;
    vcpu.set_state(&state).unwrap();
    Guest { mem, vcpu }
}

impl Guest {
    fn run_to_halt(&mut self) -> CpuState {
        assert_eq!(self.vcpu.run(Answer::None).unwrap(), Exit::Halt);
        self.vcpu.state()
    }
}

#[test]
fn arithmetic_and_a_loop() {
    let mut g = guest(|a| {
        let mut top = a.create_label();
        a.xor(eax, eax).unwrap();
        a.mov(ecx, 1000).unwrap();
        a.set_label(&mut top).unwrap();
        a.add(rax, rcx).unwrap();
        a.dec(rcx).unwrap();
        a.jnz(top).unwrap();
        a.hlt().unwrap();
    });
    let s = g.run_to_halt();
    assert_eq!(s.gpr[0], 500_500);
    assert_eq!(s.rflags & 0x8d5, 0x44);
}

#[test]
fn calls_stack_and_slotted_registers() {
    let mut g = guest(|a| {
        let (mut fib, mut small) = (a.create_label(), a.create_label());
        a.mov(edi, 15).unwrap();
        a.call(fib).unwrap();
        a.mov(r13, rax).unwrap();
        a.lea(r14, qword_ptr(r13 + r13 * 4 + 7)).unwrap();
        a.xchg(r12, r14).unwrap();
        a.andn(r15, r13, r12).unwrap();
        a.hlt().unwrap();
        a.set_label(&mut fib).unwrap();
        a.cmp(edi, 2).unwrap();
        a.jb(small).unwrap();
        a.push(rbx).unwrap();
        a.push(r12).unwrap();
        a.mov(ebx, edi).unwrap();
        a.lea(edi, dword_ptr(rbx - 1)).unwrap();
        a.call(fib).unwrap();
        a.mov(r12, rax).unwrap();
        a.lea(edi, dword_ptr(rbx - 2)).unwrap();
        a.call(fib).unwrap();
        a.add(rax, r12).unwrap();
        a.pop(r12).unwrap();
        a.pop(rbx).unwrap();
        a.ret().unwrap();
        a.set_label(&mut small).unwrap();
        a.mov(eax, edi).unwrap();
        a.ret().unwrap();
    });
    let s = g.run_to_halt();
    assert_eq!(s.gpr[0], 610);
    assert_eq!(s.gpr[12], 610 * 5 + 7);
    assert_eq!(s.gpr[15], !610 & (610 * 5 + 7));
    assert_eq!(s.gpr[4], STACK);
}

#[test]
fn flags_live_across_memory_and_returns() {
    let mut g = guest(|a| {
        let mut f = a.create_label();
        a.mov(r13d, 0x30_0ff8).unwrap();
        a.mov(r14, 0x1234_5678_9abc_def0u64).unwrap();
        a.stc().unwrap();
        a.mov(qword_ptr(r13), r14).unwrap(); // a probe between STC and ADC
        a.adc(qword_ptr(r13), 0).unwrap();
        a.mov(rax, qword_ptr(r13)).unwrap();
        a.call(f).unwrap();
        a.sbb(rbx, rbx).unwrap();
        a.mov(qword_ptr(r13 + 4), rax).unwrap(); // crosses a page
        a.mov(rdx, qword_ptr(r13 + 4)).unwrap();
        a.hlt().unwrap();
        a.set_label(&mut f).unwrap();
        a.mov(ecx, 1).unwrap();
        a.sub(rcx, 2).unwrap(); // carry, returned through RET
        a.push(rcx).unwrap();
        a.pop(rcx).unwrap();
        a.ret().unwrap();
    });
    let s = g.run_to_halt();
    assert_eq!(s.gpr[0], 0x1234_5678_9abc_def1);
    assert_eq!(s.gpr[3], u64::MAX);
    assert_eq!(s.gpr[2], s.gpr[0]);
}

#[test]
fn device_reads_and_writes_exit_as_values() {
    let mut g = guest(|a| {
        a.mov(rbx, 0x3000_0000u64).unwrap();
        a.mov(eax, dword_ptr(rbx + 8)).unwrap();
        a.add(dword_ptr(rbx + 0x10), eax).unwrap();
        a.in_(al, 0x60).unwrap();
        a.out(0x80, al).unwrap();
        a.hlt().unwrap();
    });
    let v = &mut g.vcpu;
    assert_eq!(v.run(Answer::None).unwrap(), Exit::MmioRead { gpa: 0x3000_0008, size: 4 });
    assert_eq!(v.run(Answer::Data(5)).unwrap(), Exit::MmioRead { gpa: 0x3000_0010, size: 4 });
    assert_eq!(v.run(Answer::Data(7)).unwrap(), Exit::MmioWrite { gpa: 0x3000_0010, size: 4, data: 12 });
    assert_eq!(v.run(Answer::None).unwrap(), Exit::PortIn { port: 0x60, size: 1 });
    assert_eq!(v.run(Answer::Data(0xab)).unwrap(), Exit::PortOut { port: 0x80, size: 1, data: 0xab });
    assert_eq!(v.run(Answer::None).unwrap(), Exit::Halt);
}

#[test]
fn code_that_rewrites_itself_is_translated_again() {
    let mut g = guest(|a| {
        let mut top = a.create_label();
        a.xor(ebx, ebx).unwrap();
        a.mov(ecx, 10).unwrap();
        a.set_label(&mut top).unwrap();
        a.mov(eax, 1).unwrap();
        a.add(ebx, eax).unwrap();
        a.lea(rdx, qword_ptr(top)).unwrap();
        a.inc(dword_ptr(rdx + 1)).unwrap(); // the immediate of the MOV above
        a.dec(ecx).unwrap();
        a.jnz(top).unwrap();
        a.hlt().unwrap();
    });
    let s = g.run_to_halt();
    assert_eq!(s.gpr[3], 55);
    let _ = &g.mem;
}

#[test]
fn sse_and_x87_are_the_hosts_own() {
    let mut g = guest(|a| {
        a.mov(eax, 3).unwrap();
        a.cvtsi2sd(xmm9, eax).unwrap();
        a.mov(r12d, 0x30_0000).unwrap();
        a.movsd_2(qword_ptr(r12), xmm9).unwrap();
        a.mulsd(xmm9, qword_ptr(r12)).unwrap();
        a.fninit().unwrap();
        a.fld(qword_ptr(r12)).unwrap();
        a.fmul_2(st0, st0).unwrap();
        a.fstp(qword_ptr(r12 + 8)).unwrap();
        a.cvttsd2si(rbx, xmm9).unwrap();
        a.cvttsd2si(rcx, qword_ptr(r12 + 8)).unwrap();
        a.hlt().unwrap();
    });
    let s = g.run_to_halt();
    assert_eq!((s.gpr[3], s.gpr[1]), (9, 9));
}
