//! User code whose RAM pages run at several linear addresses, with what follows them in memory different there.
#![allow(missing_docs)]

use std::sync::Arc;

use iced_x86::code_asm::*;
use iced_x86::{Code, Decoder, Instruction, MemoryOperand, Mnemonic, Register};
use wardian_cpu::bits::{cr0, cr4, efer};
use wardian_cpu::{Answer, CpuModel, CpuState, Engine, Exit, Segment, Vcpu};
use wardian_engine_soft::{Options, SoftEngine};
use wardian_irq::Quiet;
use wardian_memory::{Gpa, GuestMemory};
use wardian_time::{Nanos, TimeBase};

const TABLES: u64 = 0x1000;
const GDT: u64 = 0x7_0000;
const KERNEL: u64 = 0x8_0000;
/// Where the page tables' last level can be written: linear as physical.
const LOW: u64 = 0;

/// RAM of the code that is mapped twice, of what may follow it, and of data.
const CODE: u64 = 0x20_0000;
const NEXT: [u64; 2] = [0x20_1000, 0x20_9000];
const DATA: [u64; 2] = [0x20_5000, 0x20_6000];
/// Bit of the data that only the second has.
const BIT: u8 = 25;
const MAIN: u64 = 0x20_7000;

/// Linear places: the code at its two, the main program, the stack.
const PLACES: [u64; 2] = [0x5555_5540_0000, 0x7f12_3450_0000];
const START: u64 = 0x40_0000;
const STACK: u64 = 0x60_0000;

struct Tables<'a> {
    mem: &'a GuestMemory,
    free: u64,
}

impl Tables<'_> {
    fn entry(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        self.mem.read(Gpa(at), &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }
    fn put(&self, at: u64, value: u64) {
        self.mem.write(Gpa(at), &value.to_le_bytes()).unwrap();
    }
    /// Maps a page for user and kernel; tells where its entry lies.
    fn map(&mut self, root: u64, linear: u64, gpa: u64) -> u64 {
        let mut table = root;
        for level in [39, 30, 21] {
            let at = table + (linear >> level & 511) * 8;
            if self.entry(at) & 1 == 0 {
                self.put(at, self.free | 7);
                self.free += 4096;
            }
            table = self.entry(at) & !0xfff;
        }
        let at = table + (linear >> 12 & 511) * 8;
        self.put(at, gpa | 7);
        at
    }
}

/// The code that floats: RBX gets what shows where it ran. It ends in an instruction that reaches into the next page, which
/// goes on with [`next`].
fn function(mem: &GuestMemory) {
    let data = MemoryOperand::with_base_displ(Register::RIP, (CODE + 0x2000) as i64);
    let mut a = CodeAssembler::new(64).unwrap();
    let mut inner = a.create_label();
    let mut over = a.create_label();
    a.add_instruction(Instruction::with2(Code::Add_r64_rm64, Register::RBX, data).unwrap()).unwrap();
    a.lea(rcx, qword_ptr(inner)).unwrap();
    a.lea(edx, qword_ptr(inner)).unwrap();
    a.add(rbx, rcx).unwrap();
    a.add(rbx, rdx).unwrap();
    a.call(inner).unwrap();
    a.call(CODE + 0x1080).unwrap(); // over the page's end
    a.jmp(over).unwrap();
    a.set_label(&mut inner).unwrap();
    a.add(rbx, qword_ptr(rsp)).unwrap(); // the return address
    a.push(qword_ptr(inner)).unwrap(); // its own bytes
    a.pop(rcx).unwrap();
    a.add(rbx, rcx).unwrap();
    a.ret().unwrap();
    a.set_label(&mut over).unwrap();
    a.mov(eax, u32::from(BIT)).unwrap();
    // Run by a helper.
    a.add_instruction(Instruction::with2(Code::Bt_rm64_r64, data, Register::RAX).unwrap()).unwrap();
    a.adc(rbx, 0).unwrap();
    a.jmp(CODE + 0xffe).unwrap();
    mem.write(Gpa(CODE), &a.assemble(CODE).unwrap()).unwrap();
    // `add rbx, imm32`: 48 81 | c3 and the number, which differs.
    mem.write(Gpa(CODE + 0xffe), &[0x48, 0x81]).unwrap();
}

fn next(mem: &GuestMemory, at: u64, number: u32) {
    let mut bytes = vec![0xc3];
    bytes.extend(number.to_le_bytes());
    bytes.push(0xc3); // ret
    mem.write(Gpa(at), &bytes).unwrap();
    // The function that is called over the page's end.
    let mut a = CodeAssembler::new(64).unwrap();
    a.add(rbx, (number * 16) as i32).unwrap();
    a.add(rbx, qword_ptr(rsp)).unwrap();
    a.ret().unwrap();
    mem.write(Gpa(at + 0x80), &a.assemble(CODE + 0x1080).unwrap()).unwrap();
}

/// What one run of the function adds to RBX.
fn expected(mem: &GuestMemory, place: u64, data: u64, number: u64) -> u64 {
    let mut bytes = [0; 0x100];
    mem.read(Gpa(CODE), &mut bytes).unwrap();
    let mut sum = data + (data >> BIT & 1);
    let mut decoder = Decoder::with_ip(64, &bytes, place, 0);
    let mut calls = 0;
    for insn in &mut decoder {
        match insn.mnemonic() {
            Mnemonic::Lea if insn.op0_register() == Register::RCX => {
                sum = sum.wrapping_add(insn.memory_displacement64());
            }
            Mnemonic::Lea => {
                sum = sum.wrapping_add(insn.memory_displacement64() & 0xffff_ffff);
            }
            Mnemonic::Call => {
                sum = sum.wrapping_add(insn.next_ip());
                calls += 1;
            }
            Mnemonic::Push => {
                let at = (insn.memory_displacement64() - place) as usize;
                sum = sum.wrapping_add(u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()));
            }
            Mnemonic::Bt => break,
            _ => {}
        }
    }
    assert_eq!(calls, 2);
    sum.wrapping_add(number * 17)
}

struct Guest {
    mem: GuestMemory,
    vcpu: Box<dyn Vcpu>,
    /// Entries of the pages that follow the code, in the first address space.
    followers: [u64; 2],
}

const ROOTS: [u64; 2] = [TABLES, TABLES + 0x1000];

/// A guest whose user program is made by `main`; SYSCALL writes RDI to the page-table entry RSI and invalidates RDX, or
/// with RDX zero loads CR3 from RDI.
fn guest(main: impl FnOnce(&mut CodeAssembler, &Guest)) -> Guest {
    let time = TimeBase::manual(Nanos(0));
    let offer = SoftEngine::offer(&time);
    let mem = GuestMemory::new(16 << 20).unwrap();
    let mut tables = Tables { mem: &mem, free: TABLES + 0x2000 };
    let mut followers = [0; 2];
    for (n, root) in ROOTS.into_iter().enumerate() {
        for page in 0..0x100 {
            tables.map(root, LOW + page * 4096, page * 4096);
        }
        tables.map(root, START, MAIN);
        tables.map(root, STACK - 4096, 0x20_8000);
        for (m, place) in PLACES.into_iter().enumerate() {
            tables.map(root, place, CODE);
            let follower = tables.map(root, place + 0x1000, NEXT[m ^ n]);
            tables.map(root, place + 0x2000, DATA[m]);
            if n == 0 {
                followers[m] = follower;
            }
        }
    }
    assert!(tables.free < GDT);
    function(&mem);
    next(&mem, NEXT[0], 3);
    next(&mem, NEXT[1], 5);
    mem.write(Gpa(DATA[0]), &0x100_0000u64.to_le_bytes()).unwrap();
    mem.write(Gpa(DATA[1]), &0x700_0000u64.to_le_bytes()).unwrap();
    // Null, kernel code and data, (SYSRET's base) user data, user code.
    for (n, entry) in
        [0, 0x00af_9b00_0000_ffffu64, 0x00cf_9300_0000_ffff, 0, 0x00cf_f300_0000_ffff, 0x00af_fb00_0000_ffff]
            .into_iter()
            .enumerate()
    {
        mem.write(Gpa(GDT + n as u64 * 8), &entry.to_le_bytes()).unwrap();
    }
    let mut a = CodeAssembler::new(64).unwrap();
    let (mut handler, mut space) = (a.create_label(), a.create_label());
    for (msr, value) in [(0xc000_0081u32, 0x0018_0008_0000_0000u64), (0xc000_0084, 0)] {
        a.mov(ecx, msr).unwrap();
        a.mov(eax, value as u32).unwrap();
        a.mov(edx, (value >> 32) as u32).unwrap();
        a.wrmsr().unwrap();
    }
    a.mov(ecx, 0xc000_0082u32).unwrap();
    a.lea(rax, qword_ptr(handler)).unwrap();
    a.xor(edx, edx).unwrap();
    a.wrmsr().unwrap();
    a.mov(rcx, START).unwrap();
    a.mov(r11, 0x3002u64).unwrap(); // IOPL 3
    a.sysretq().unwrap();
    a.set_label(&mut handler).unwrap();
    a.test(rdx, rdx).unwrap();
    a.je(space).unwrap();
    a.mov(qword_ptr(rsi), rdi).unwrap();
    a.invlpg(byte_ptr(rdx)).unwrap();
    a.sysretq().unwrap();
    a.set_label(&mut space).unwrap();
    a.mov(cr3, rdi).unwrap();
    a.sysretq().unwrap();
    mem.write(Gpa(KERNEL), &a.assemble(KERNEL).unwrap()).unwrap();

    let model = Arc::new(CpuModel::host("host", &offer).unwrap());
    let engine = SoftEngine::new(mem.clone(), time, &Options { cpus: 1 }).unwrap();
    let vcpu = engine.create_vcpu(0, &model, Arc::new(Quiet)).unwrap();
    let mut guest = Guest { mem, vcpu, followers };
    let mut a = CodeAssembler::new(64).unwrap();
    main(&mut a, &guest);
    a.out(0x80, al).unwrap();
    guest.mem.write(Gpa(MAIN), &a.assemble(START).unwrap()).unwrap();
    let mut state = CpuState::reset();
    let data = Segment { selector: 0x10, base: 0, limit: u32::MAX, rights: 0xc093 };
    state.segments = [data; 6];
    state.segments[CpuState::CS] = Segment { selector: 8, base: 0, limit: u32::MAX, rights: 0xa09b };
    state.cr0 = cr0::PE | cr0::PG | cr0::WP | cr0::NE | cr0::ET;
    state.cr4 = cr4::PAE;
    state.cr3 = ROOTS[0];
    state.efer = efer::LME | efer::LMA | efer::NXE | efer::SCE;
    state.rip = KERNEL;
    state.gpr[CpuState::RSP] = STACK;
    state.gdtr.base = GDT;
    state.gdtr.limit = 0x2f;
    guest.vcpu.set_state(&state).unwrap();
    guest
}

impl Guest {
    /// Runs to the end; RBX.
    fn sum(&mut self) -> u64 {
        let exit = self.vcpu.run(Answer::None).unwrap();
        assert!(matches!(exit, Exit::PortOut { port: 0x80, .. }), "{exit:?} at {:x}", self.vcpu.state().rip);
        self.vcpu.state().gpr[3]
    }
    fn translations(&self) -> u64 {
        self.vcpu.counters().into_iter().find(|(name, _)| *name == "translations").unwrap().1
    }
}

/// Calls the function at `places`, `times` times all of them.
fn calls(a: &mut CodeAssembler, places: &[u64], times: u32) {
    let mut again = a.create_label();
    a.mov(r13d, times).unwrap();
    a.set_label(&mut again).unwrap();
    for place in places {
        a.mov(r14, *place).unwrap();
        a.call(r14).unwrap();
    }
    a.dec(r13d).unwrap();
    a.jne(again).unwrap();
}

/// System call: page-table entry `at` becomes `value`.
fn remap(a: &mut CodeAssembler, at: u64, value: u64, linear: u64) {
    a.mov(rdi, value).unwrap();
    a.mov(rsi, at).unwrap();
    a.mov(rdx, linear).unwrap();
    a.syscall().unwrap();
}

fn load_cr3(a: &mut CodeAssembler, root: u64) {
    a.mov(rdi, root).unwrap();
    a.xor(edx, edx).unwrap();
    a.syscall().unwrap();
}

#[test]
fn a_page_runs_at_two_places_in_turn_and_is_translated_once() {
    let mut guest = guest(|a, guest| {
        remap(a, guest.followers[1], NEXT[0] | 7, PLACES[1] + 0x1000);
        calls(a, &PLACES, 100);
    });
    let [one, two] = [0, 1].map(|n| expected(&guest.mem, PLACES[n], [0x100_0000, 0x700_0000][n], 3));
    assert_eq!(guest.sum(), one.wrapping_add(two).wrapping_mul(100));
    assert!(guest.translations() < 40, "{} translations", guest.translations());
}

#[test]
fn a_page_runs_at_two_places_with_other_pages_behind_it() {
    let mut guest = guest(|a, _| calls(a, &PLACES, 100));
    let [one, two] = [(0, 3), (1, 5)]
        .map(|(n, number)| expected(&guest.mem, PLACES[n], [0x100_0000, 0x700_0000][n], number));
    assert_eq!(guest.sum(), one.wrapping_add(two).wrapping_mul(100));
}

#[test]
fn what_follows_the_page_is_found_anew_after_invlpg() {
    let mut guest = guest(|a, guest| {
        calls(a, &PLACES[..1], 50);
        remap(a, guest.followers[0], NEXT[1] | 7, PLACES[0] + 0x1000);
        calls(a, &PLACES[..1], 50);
    });
    let [before, after] = [3, 5].map(|number| expected(&guest.mem, PLACES[0], 0x100_0000, number));
    assert_eq!(guest.sum(), before.wrapping_add(after).wrapping_mul(50));
}

#[test]
fn what_follows_the_page_is_found_anew_in_another_address_space() {
    let mut guest = guest(|a, _| {
        let mut again = a.create_label();
        a.mov(r15d, 20u32).unwrap();
        a.set_label(&mut again).unwrap();
        for root in ROOTS {
            load_cr3(a, root);
            calls(a, &PLACES[..1], 3);
        }
        a.dec(r15d).unwrap();
        a.jne(again).unwrap();
    });
    let [first, second] = [3, 5].map(|number| expected(&guest.mem, PLACES[0], 0x100_0000, number));
    assert_eq!(guest.sum(), first.wrapping_add(second).wrapping_mul(60));
    // The instruction that reaches into the page that differs is the only one that is translated again.
    assert!(guest.translations() < 120, "{} translations", guest.translations());
}

#[test]
fn a_page_that_is_unmapped_faults_though_it_was_translated() {
    let mut guest = guest(|a, guest| {
        calls(a, &PLACES, 2);
        remap(a, guest.followers[1], 0, PLACES[1] + 0x1000);
        calls(a, &PLACES[1..], 1);
    });
    // There is no handler.
    assert_eq!(guest.vcpu.run(Answer::None).unwrap(), Exit::Shutdown);
    assert_eq!(guest.vcpu.state().cr2, PLACES[1] + 0x1080);
}
