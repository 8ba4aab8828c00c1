//! Retired instructions: counted exactly, stopped at exactly, whatever way the engine takes.
#![allow(missing_docs)]

use std::sync::Arc;

use iced_x86::code_asm::*;
use wardian_cpu::bits::{cr0, cr4, efer};
use wardian_cpu::{Answer, CpuModel, CpuState, DebugEvent, DebugRequest, Engine, Exit, Segment, Vcpu};
use wardian_engine_soft::{Options, SoftEngine};
use wardian_irq::Quiet;
use wardian_memory::{Gpa, GuestMemory};
use wardian_time::{Nanos, ResumePolicy, TimeBase, TimeConfig};

const CODE: u64 = 0x10_0000;
const STACK: u64 = 0x20_0000;
const DATA: u64 = 0x30_0000;
const GDT: u64 = 0x5000;
const IDT: u64 = 0x6000;
const DEVICE: u64 = 0x3000_0000;
/// Not mapped.
const NOWHERE: u64 = 0x4000_0000;

/// A bit of everything: every kind of block end, side exits, faults of the engine's and of the host's finding, device
/// accesses within blocks, accesses over two pages, code that rewrites itself, repetitions.
fn program(a: &mut CodeAssembler) -> Result<(), iced_x86::IcedError> {
    let mut labels: [CodeLabel; 10] = std::array::from_fn(|_| a.create_label());
    let [top, odd, on, f, skip, patched, plain, coded, twice, end] = &mut labels;
    a.mov(ebp, 6)?;
    a.mov(r13, DATA)?;
    a.set_label(top)?;
    // Side exits, taken and not.
    a.mov(ecx, 9)?;
    a.set_label(twice)?;
    a.add(rax, rcx)?;
    a.test(ecx, 1)?;
    a.jnz(*odd)?;
    a.add(rbx, 3)?;
    a.cmp(rbx, rax)?;
    a.ja(*on)?;
    a.xor(rdx, rbx)?;
    a.set_label(odd)?;
    a.inc(rdx)?;
    a.set_label(on)?;
    a.loop_(*twice)?;
    a.jrcxz(*skip)?;
    a.ud2()?;
    a.set_label(skip)?;
    // Calls, returns, the stack.
    a.call(*f)?;
    a.lea(rsi, qword_ptr(*f))?;
    a.push(rsi)?;
    a.call(qword_ptr(rsp))?;
    a.pop(rsi)?;
    // Over two pages, plain and locked.
    a.mov(qword_ptr(r13 + 0xffc), rax)?;
    a.adc(qword_ptr(r13 + 0xffc), 5)?;
    a.lock().add(dword_ptr(r13 + 0xffe), 7)?;
    a.mov(rdi, qword_ptr(r13 + 0xffb))?;
    // Devices, with something behind them in the same block.
    a.mov(r14, DEVICE)?;
    a.mov(eax, dword_ptr(r14 + 4))?;
    a.add(eax, 1)?;
    a.mov(dword_ptr(r14), eax)?;
    a.add(eax, 2)?;
    a.xor(dword_ptr(r14 + 8), eax)?;
    a.sbb(eax, 3)?;
    a.in_(al, 0x60)?;
    a.out(0x80, al)?;
    // Faults: of the host's finding, of the page walk, of the decoder.
    a.mov(r11d, 2)?;
    a.xor(ecx, ecx)?;
    a.mov(eax, 1)?;
    a.div(ecx)?;
    a.mov(r11d, 3)?;
    a.mov(r12, NOWHERE)?;
    a.stc()?;
    a.mov(r10, qword_ptr(r12))?; // four bytes with SIB
    a.nop()?;
    a.mov(r11d, 2)?;
    a.ud2()?;
    // Interpreted ones, repetitions, time.
    a.xor(eax, eax)?;
    a.xor(ecx, ecx)?;
    a.cpuid()?;
    a.rdtsc()?;
    a.mov(ecx, 300)?;
    a.lea(rsi, qword_ptr(r13))?;
    a.lea(rdi, qword_ptr(r13 + 0x2100))?;
    a.rep().movsb()?;
    a.xor(ecx, ecx)?;
    a.rep().stosb()?;
    a.mov(ecx, 40)?;
    a.lea(rdi, qword_ptr(r13 + 0x2000))?;
    a.repne().scasb()?;
    a.std()?;
    a.cld()?;
    // Code that rewrites itself, itself included.
    a.lea(rdx, qword_ptr(*patched))?;
    a.inc(dword_ptr(rdx + 1))?;
    a.add(rbx, 1)?;
    a.set_label(patched)?;
    a.mov(eax, 1)?;
    a.add(rbx, rax)?;
    a.mov(r11d, 0)?;
    a.int3()?;
    a.dec(ebp)?;
    a.jnz(*top)?;
    a.jmp(*end)?;
    a.set_label(f)?;
    a.push(rbx)?;
    a.pop(r15)?;
    a.ret()?;
    // Handlers go on behind the instruction: R11 is its length.
    a.set_label(coded)?;
    a.add(rsp, 8)?;
    a.inc(r11)?;
    a.set_label(plain)?;
    a.add(qword_ptr(rsp), r11)?;
    a.iretq()?;
    a.set_label(end)?;
    a.lea(rax, qword_ptr(*plain))?;
    a.lea(rbx, qword_ptr(*coded))?;
    a.hlt()?;
    Ok(())
}

struct Guest {
    vcpu: Box<dyn Vcpu>,
    time: Arc<TimeBase>,
    asked: u64,
    answer: Answer,
}

/// What must be the same.
type Look = ([u64; 16], u64, u64);

fn put(mem: &GuestMemory, at: u64, value: u64) {
    mem.write(Gpa(at), &value.to_le_bytes()).unwrap();
}

fn guest() -> Guest {
    let mem = GuestMemory::new(64 << 20).unwrap();
    let mut a = CodeAssembler::new(64).unwrap();
    program(&mut a).unwrap();
    let options = iced_x86::BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
    let assembled = a.assemble_options(CODE, options).unwrap();
    mem.write(Gpa(CODE), &assembled.inner.code_buffer).unwrap();
    // The handlers are the eight instructions before the last three: found by where they are.
    let offsets = &assembled.inner.new_instruction_offsets;
    let at = |from_end: usize| CODE + u64::from(offsets[offsets.len() - from_end]);
    let (plain, coded) = (at(5), at(7));
    put(&mem, 0x1000, 0x2003);
    put(&mem, 0x2000, 0x3003);
    for n in 0..512u64 {
        put(&mem, 0x3000 + n * 8, n << 21 | 0x83);
    }
    put(&mem, GDT + 8, 0x00af_9b00_0000_ffff);
    put(&mem, GDT + 16, 0x00cf_9300_0000_ffff);
    for (vector, handler) in [(0, plain), (3, plain), (6, plain), (14, coded)] {
        put(&mem, IDT + vector * 16, handler & 0xffff | 8 << 16 | 0x8e00 << 32 | (handler >> 16) << 48);
    }
    let time = TimeBase::counted(Nanos(0), TimeConfig::default());
    time.resume(ResumePolicy::Freeze);
    let model = Arc::new(CpuModel::host("host", &SoftEngine::offer(&time)).unwrap());
    let engine = SoftEngine::new(mem, Arc::clone(&time), &Options { cpus: 1 }).unwrap();
    let mut vcpu = engine.create_vcpu(0, &model, Arc::new(Quiet)).unwrap();
    let mut state = CpuState::reset();
    let data = Segment { selector: 0x10, base: 0, limit: u32::MAX, rights: 0xc093 };
    state.segments = [data; 6];
    state.segments[CpuState::CS] = Segment { selector: 8, base: 0, limit: u32::MAX, rights: 0xa09b };
    state.gdtr.base = GDT;
    state.gdtr.limit = 23;
    state.idtr.base = IDT;
    state.idtr.limit = 0xfff;
    state.cr0 = cr0::PE | cr0::PG | cr0::WP | cr0::NE | cr0::ET;
    state.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT;
    state.cr3 = 0x1000;
    state.efer = efer::LME | efer::LMA | efer::NXE;
    state.rip = CODE;
    state.gpr[CpuState::RSP] = STACK;
    vcpu.set_state(&state).unwrap();
    Guest { vcpu, time, asked: 0, answer: Answer::None }
}

impl Guest {
    /// Runs to what is no question to the machine.
    fn run(&mut self) -> Exit {
        loop {
            let exit = self.vcpu.run(self.answer).unwrap();
            self.answer = Answer::None;
            match exit {
                Exit::MmioRead { .. } | Exit::PortIn { .. } => {
                    self.asked += 1;
                    self.answer = Answer::Data(self.asked * 0x11);
                }
                Exit::MmioWrite { .. } | Exit::PortOut { .. } => {}
                other => return other,
            }
        }
    }

    fn look(&mut self) -> Look {
        let state = self.vcpu.state();
        (state.gpr, state.rip, state.rflags & !0x1_0000)
    }

    fn retired(&self) -> u64 {
        self.vcpu.retired().expect("it counts")
    }
}

/// What is seen after each single step.
fn steps() -> Vec<Look> {
    let mut g = guest();
    g.vcpu.set_debug(&DebugRequest { single_step: true, ..DebugRequest::default() });
    let mut all = Vec::new();
    let mut faults = 0;
    loop {
        match g.run() {
            // A step over a fault ends at the handler, and nothing has retired.
            Exit::Debug(DebugEvent::Step) if g.retired() == all.len() as u64 => faults += 1,
            Exit::Debug(DebugEvent::Step) => {
                all.push(g.look());
                assert!(all.len() < 5000, "the program does not end");
                assert_eq!(g.retired(), all.len() as u64, "a step is an instruction");
            }
            Exit::Halt => {
                assert!(all.len() > 500, "only {} steps", all.len());
                assert!((1..100).contains(&faults), "{faults} faults");
                return all;
            }
            other => panic!("{other:?} after {} steps", all.len()),
        }
    }
}

#[test]
fn an_instruction_is_counted_once_on_every_way() {
    let steps = steps();
    let mut g = guest();
    assert_eq!(g.run(), Exit::Halt);
    // A halted vCPU does not step: HLT is the one more.
    let total = steps.len() as u64 + 1;
    let halted = steps.last().is_some_and(|(_, rip, _)| *rip == g.vcpu.state().rip);
    assert_eq!(g.retired(), if halted { total - 1 } else { total });
    assert_eq!(g.time.timeline(), Nanos(g.retired()), "an instruction is a nanosecond");
}

#[test]
fn a_limit_stops_at_exactly_that_instruction() {
    let steps = steps();
    for stride in [1, 2, 3, 7, 40, 333] {
        let mut g = guest();
        for (n, want) in steps.iter().enumerate().skip(stride - 1).step_by(stride) {
            g.vcpu.set_limit(Some(n as u64 + 1));
            match g.run() {
                Exit::Limit => {}
                Exit::Halt if n + 1 == steps.len() => break,
                other => panic!("{other:?} at {n}"),
            }
            assert_eq!(g.retired(), n as u64 + 1);
            // At the head of a block, flags that nobody reads may be stale.
            let flags = |look: Look| if stride == 1 { look } else { (look.0, look.1, look.2 & !0x8d5) };
            assert_eq!(flags(g.look()), flags(*want), "after {} instructions, by {stride}", n + 1);
            assert_eq!(g.time.timeline().0, n as u64 + 1);
        }
    }
}

#[test]
fn a_limit_that_is_passed_stops_before_the_next_instruction() {
    let mut g = guest();
    g.vcpu.set_limit(Some(20));
    assert_eq!(g.run(), Exit::Limit);
    let there = g.look();
    for limit in [20, 3, 0] {
        g.vcpu.set_limit(Some(limit));
        assert_eq!(g.run(), Exit::Limit);
        assert_eq!((g.retired(), g.look()), (20, there));
    }
    g.vcpu.set_limit(None);
    assert_eq!(g.run(), Exit::Halt);
}
