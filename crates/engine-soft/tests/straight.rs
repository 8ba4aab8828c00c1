//! Instructions that are run out of translated code, and what they let in.
#![allow(missing_docs)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use iced_x86::code_asm::*;
use wardian_cpu::bits::{cr0, cr4, efer};
use wardian_cpu::{Answer, CpuModel, CpuState, Engine, Exit, Segment};
use wardian_engine_soft::{Options, SoftEngine};
use wardian_irq::{Kick, LocalInterrupts, PendingEvents};
use wardian_memory::{Gpa, GuestMemory};
use wardian_time::{Nanos, TimeBase};

const CODE: u64 = 0x10_0000;
const HANDLER: u64 = 0x18_0000;
const STACK: u64 = 0x20_0000;
const GDT: u64 = 0x5000;
const IDT: u64 = 0x6000;
const VECTOR: u8 = 0x40;

/// One interrupt, pending from the start, for which nobody kicks again.
struct One(AtomicBool);

impl LocalInterrupts for One {
    fn pending(&self) -> PendingEvents {
        PendingEvents { interrupt: self.0.load(Ordering::Relaxed), ..PendingEvents::default() }
    }
    fn acknowledge(&self) -> Option<u8> {
        self.0.swap(false, Ordering::Relaxed).then_some(VECTOR)
    }
    fn take_nmi(&self) -> bool {
        false
    }
    fn take_init(&self) -> bool {
        false
    }
    fn take_startup(&self) -> Option<u8> {
        None
    }
    fn cr8(&self) -> u8 {
        0
    }
    fn set_cr8(&self, _priority: u8) {}
    fn apic_base(&self) -> u64 {
        0xfee0_0900
    }
    fn attach(&self, _kick: Arc<dyn Kick>) {}
}

/// Runs `program`, which starts with IF clear and an interrupt pending, to its HLT: RBX says how far it had come when the
/// interrupt's handler (which adds 100h to it and returns) was called, RCX is zeroed at the end.
fn interrupted_at(program: impl FnOnce(&mut CodeAssembler)) -> u64 {
    let time = TimeBase::manual(Nanos(0));
    let offer = SoftEngine::offer(&time);
    let mem = GuestMemory::new(16 << 20).unwrap();
    let put = |at: u64, value: u64| mem.write(Gpa(at), &value.to_le_bytes()).unwrap();
    let mut a = CodeAssembler::new(64).unwrap();
    program(&mut a);
    a.cli().unwrap();
    a.hlt().unwrap();
    mem.write(Gpa(CODE), &a.assemble(CODE).unwrap()).unwrap();
    let mut a = CodeAssembler::new(64).unwrap();
    a.mov(rsi, rbx).unwrap();
    a.iretq().unwrap();
    mem.write(Gpa(HANDLER), &a.assemble(HANDLER).unwrap()).unwrap();
    put(0x1000, 0x2003);
    put(0x2000, 0x3003);
    for n in 0..512u64 {
        put(0x3000 + n * 8, n << 21 | 0x83);
    }
    put(GDT + 8, 0x00af_9b00_0000_ffff);
    put(GDT + 16, 0x00cf_9300_0000_ffff);
    let gate = IDT + u64::from(VECTOR) * 16;
    put(gate, (HANDLER & 0xffff) | 8 << 16 | 0x8e00 << 32 | (HANDLER >> 16) << 48);
    put(gate + 8, 0);
    let model = Arc::new(CpuModel::host("host", &offer).unwrap());
    let engine = SoftEngine::new(mem, time, &Options { cpus: 1 }).unwrap();
    let mut vcpu = engine.create_vcpu(0, &model, Arc::new(One(AtomicBool::new(true)))).unwrap();
    let mut state = CpuState::reset();
    let data = Segment { selector: 0x10, base: 0, limit: u32::MAX, rights: 0xc093 };
    state.segments = [data; 6];
    state.segments[CpuState::CS] = Segment { selector: 8, base: 0, limit: u32::MAX, rights: 0xa09b };
    state.cr0 = cr0::PE | cr0::PG | cr0::WP | cr0::NE | cr0::ET;
    state.cr4 = cr4::PAE;
    state.cr3 = 0x1000;
    state.efer = efer::LME | efer::LMA | efer::NXE;
    state.rip = CODE;
    state.gpr[CpuState::RSP] = STACK;
    state.gpr[6] = u64::MAX; // RSI: not interrupted
    state.gdtr.base = GDT;
    state.gdtr.limit = 0x17;
    state.idtr.base = IDT;
    state.idtr.limit = 0xfff;
    vcpu.set_state(&state).unwrap();
    assert_eq!(vcpu.run(Answer::None).unwrap(), Exit::Halt);
    vcpu.state().gpr[6]
}

/// `mov ebx, n` for the values from `first` on.
fn steps(a: &mut CodeAssembler, first: u32, count: u32) {
    for n in first..first + count {
        a.mov(ebx, n).unwrap();
    }
}

#[test]
fn popf_lets_a_held_interrupt_in_at_once() {
    let at = interrupted_at(|a| {
        steps(a, 0, 3);
        a.pushfq().unwrap();
        a.or(qword_ptr(rsp), 0x200).unwrap();
        a.popfq().unwrap();
        steps(a, 3, 3);
    });
    assert_eq!(at, 2);
}

#[test]
fn sti_lets_it_in_not_before_one_more_instruction() {
    let at = interrupted_at(|a| {
        steps(a, 0, 3);
        a.sti().unwrap();
        steps(a, 3, 3);
    });
    assert!((3..6).contains(&at), "interrupted at {at}");
    // Even if that is a CLI: then not at all.
    let at = interrupted_at(|a| {
        steps(a, 0, 3);
        a.sti().unwrap();
        a.cli().unwrap();
        steps(a, 3, 3);
    });
    assert_eq!(at, u64::MAX);
    // STI with IF set already holds nothing off.
    let at = interrupted_at(|a| {
        steps(a, 0, 3);
        a.sti().unwrap();
        a.sti().unwrap();
        steps(a, 3, 3);
    });
    assert_eq!(at, 2);
}

#[test]
fn iret_lets_it_in_at_its_target() {
    let at = interrupted_at(|a| {
        let mut target = a.create_label();
        steps(a, 0, 3);
        a.mov(rax, rsp).unwrap();
        a.push(0x10).unwrap();
        a.push(rax).unwrap();
        a.push(0x202).unwrap();
        a.push(8).unwrap();
        a.lea(rax, qword_ptr(target)).unwrap();
        a.push(rax).unwrap();
        a.iretq().unwrap();
        steps(a, 3, 3);
        a.set_label(&mut target).unwrap();
        steps(a, 6, 3);
    });
    assert_eq!(at, 2);
}

#[test]
fn a_loop_that_opens_a_window_of_two_instructions_is_interrupted() {
    let at = interrupted_at(|a| {
        let mut again = a.create_label();
        a.mov(ecx, 1000).unwrap();
        a.set_label(&mut again).unwrap();
        a.sti().unwrap();
        a.nop().unwrap();
        a.nop().unwrap();
        a.mov(rbx, rcx).unwrap();
        a.cli().unwrap();
        a.dec(ecx).unwrap();
        a.jne(again).unwrap();
    });
    assert!((0..=1000).contains(&at), "interrupted at {at:#x}");
}
