//! Random cases: an encoding, registers and memory that make it do something, flags, vector state.

use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic as M, OpAccess,
    OpKind, Register, RflagsBits,
};
use wardian_cpu::bits::rflags;

use crate::case::{CODE, Case, DATA, DATA_PAGES, READ_ONLY, SLOT, State, TLS_BASE, TLS_SELECTOR, XSAVE};
use crate::encode::{Addressing, Plan, decode, encode};
use crate::rng::Rng;

/// What a generator is allowed to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// 64 or 32.
    pub bitness: u32,
    /// Encodings to choose from.
    pub codes: Vec<Code>,
    /// XCR0 of both sides.
    pub xcr0: u64,
    /// Whether a LOCKed access may cross a cache line (some hosts punish it).
    pub split_locks: bool,
}

/// Makes cases.
pub struct Generator {
    rng: Rng,
    options: Options,
    /// Encodings that may be part of a sequence.
    calm: Vec<Code>,
    info: InstructionInfoFactory,
    turn: usize,
}

const FLAGS: [(u32, u64); 6] = [
    (RflagsBits::CF, rflags::CF),
    (RflagsBits::PF, rflags::PF),
    (RflagsBits::AF, rflags::AF),
    (RflagsBits::ZF, rflags::ZF),
    (RflagsBits::SF, rflags::SF),
    (RflagsBits::OF, rflags::OF),
];

fn number(register: Register) -> usize {
    register.full_register().number()
}

fn is_general(register: Register) -> bool {
    register.is_gpr32() || register.is_gpr64() || register.is_gpr16()
}

/// Arithmetic flags out of the decoder's flag bits.
fn flags(bits: u32) -> u64 {
    FLAGS.iter().filter(|(bit, _)| bits & bit != 0).fold(0, |mask, (_, flag)| mask | flag)
}

/// Flags that the manual leaves undefined after `instruction`.
fn undefined(instruction: &Instruction) -> u64 {
    flags(instruction.rflags_undefined())
}

/// With a count of zero it changes no flags.
fn may_leave_flags(instruction: &Instruction) -> bool {
    matches!(
        instruction.mnemonic(),
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd
    )
}

/// Whether it records itself in the x87 pointers, or loads them.
fn records_x87(instruction: &Instruction) -> bool {
    let silent = matches!(
        instruction.mnemonic(),
        M::Fnclex
            | M::Fldcw
            | M::Fnstcw
            | M::Fnstsw
            | M::Fnstenv
            | M::Fnsave
            | M::Wait
            | M::Fxsave
            | M::Fxsave64
    );
    let name = format!("{:?}", instruction.mnemonic());
    (name.starts_with('F') || name.starts_with("Xrstor")) && !silent
}

fn leaves_line(instruction: &Instruction) -> bool {
    !matches!(instruction.flow_control(), FlowControl::Next | FlowControl::Exception)
}

impl Generator {
    /// The cases of `seed`.
    #[must_use]
    pub fn new(seed: u64, options: Options) -> Generator {
        let calm = options.codes.iter().copied().filter(|code| is_calm(*code)).collect();
        Generator { rng: Rng::new(seed), options, calm, info: InstructionInfoFactory::new(), turn: 0 }
    }

    /// New contents for the data window and the read-only page.
    pub fn window(&mut self, out: &mut [u8]) {
        for part in out.chunks_mut(256) {
            match self.rng.below(6) {
                0 => part.fill(0),
                1 => {
                    let byte = self.rng.any() as u8;
                    part.fill(byte);
                }
                _ => {
                    for lanes in part.chunks_mut(64) {
                        self.rng.lanes(lanes);
                    }
                }
            }
        }
    }

    /// A case of one instruction for code slot `slot`. Encodings come in turn, so that all are covered alike.
    pub fn single(&mut self, slot: usize) -> Case {
        loop {
            let code = self.options.codes[self.turn % self.options.codes.len()];
            self.turn += 1;
            if let Some(case) = self.of(code, slot) {
                return case;
            }
        }
    }

    /// Where code goes in slot `slot`; `cross` bytes before the page boundary if the slot has one.
    fn place(&mut self, slot: usize) -> u64 {
        let base = CODE + 256 + slot as u64 * SLOT;
        if (base + 256).is_multiple_of(4096) {
            base + 256 - self.rng.below(8)
        } else {
            base + 200 + self.rng.below(64)
        }
    }

    fn state(&mut self) -> State {
        let rng = &mut self.rng;
        let mut state = State::new();
        for gpr in &mut state.gpr {
            *gpr = rng.integer();
        }
        state.rflags = 0x202 | rng.any() & rflags::ARITH;
        if rng.chance(20) {
            state.rflags |= rflags::DF;
        }
        if rng.chance(5) {
            state.rflags |= rflags::ID;
        }
        if rng.chance(2) {
            state.rflags |= rflags::AC;
        }
        if self.options.bitness == 32 {
            state.selectors = [0x2b, 0x2b, TLS_SELECTOR, TLS_SELECTOR];
            (state.fs, state.gs) = (TLS_BASE, TLS_BASE);
        } else if rng.chance(70) {
            state.fs = rng.below(0x1000_0000);
            state.gs = rng.pick(&[0u64, 8, 0x1000, 0xffff_8000_0000_0000]).wrapping_add(rng.below(0x1_0000));
        }
        self.vectors(&mut state.xsave);
        state
    }

    fn vectors(&mut self, image: &mut [u8; XSAVE]) {
        let rng = &mut self.rng;
        let xcr0 = self.options.xcr0;
        let control =
            if rng.chance(85) { 0x7f } else { 0x40 | rng.below(64) as u16 } | (rng.below(16) << 8) as u16;
        let mut status =
            (rng.any() & 0x7f7f) as u16 & if rng.chance(90) { 0x7f00 | control & 0x3f } else { 0xffff };
        if rng.chance(50) {
            status &= 0x4700;
        }
        status &= !0x8080;
        if status & !control & 0x3f != 0 {
            status |= 0x8080;
        }
        image[0..2].copy_from_slice(&control.to_le_bytes());
        image[2..4].copy_from_slice(&status.to_le_bytes());
        image[4] = match rng.below(3) {
            0 => 0xff,
            1 => 0,
            _ => rng.any() as u8,
        };
        let mxcsr = if rng.chance(85) { 0x1f80 } else { (rng.below(64) << 7) as u32 };
        let mxcsr = mxcsr
            | (rng.below(4) << 13) as u32
            | (rng.below(64) as u32 & if rng.chance(70) { 0 } else { 63 });
        let mode = if rng.chance(15) { rng.any() as u32 & 0x8040 } else { 0 };
        image[24..28].copy_from_slice(&(mxcsr | mode).to_le_bytes());
        image[28..32].copy_from_slice(&0xffffu32.to_le_bytes());
        for n in 0..8 {
            let at = 32 + n * 16;
            if rng.chance(40) {
                let mantissa = (1 << 63) | rng.any() >> 1;
                image[at..at + 8].copy_from_slice(&mantissa.to_le_bytes());
                let exponent = (0x3fff - 70 + rng.below(140)) as u16 | (rng.below(2) << 15) as u16;
                image[at + 8..at + 10].copy_from_slice(&exponent.to_le_bytes());
            } else {
                rng.lanes(&mut image[at..at + 10]);
                if rng.chance(50) {
                    let exponent = rng.pick(&[0u16, 0x7fff, 0x8000, 0xffff]);
                    image[at + 8..at + 10].copy_from_slice(&exponent.to_le_bytes());
                }
            }
        }
        if rng.chance(50) {
            rng.lanes(&mut image[160..416]);
        } else {
            image[160..416].chunks_mut(16).for_each(|lanes| rng.lanes(lanes));
        }
        image[512..520].copy_from_slice(&(xcr0 & 7).to_le_bytes());
        if xcr0 & 4 != 0 {
            image[576..832].chunks_mut(16).for_each(|lanes| rng.lanes(lanes));
        }
        if xcr0 & 0xe0 == 0xe0 {
            image[512..520].copy_from_slice(&xcr0.to_le_bytes());
            image[832..].chunks_mut(32).for_each(|lanes| rng.lanes(lanes));
        }
    }

    /// Where an access of `size` bytes goes.
    fn target(&mut self, size: u64, locked: bool) -> u64 {
        let rng = &mut self.rng;
        let aligned = DATA + 0x1000 + rng.below(128) * 64;
        let crossing = |rng: &mut Rng, edge: u64| edge - 1 - rng.below(size.max(2) - 1);
        let calm = locked && !self.options.split_locks;
        match rng.below(100) {
            _ if calm => aligned + rng.below(64 / size.max(1)) * size,
            0..55 => aligned,
            55..80 => aligned + rng.below(64),
            80..93 => {
                let edge = DATA + 0x1000 * (1 + rng.below(DATA_PAGES - 1));
                crossing(rng, edge)
            }
            93..95 => crossing(rng, DATA + DATA_PAGES * 4096),
            95..96 => DATA + DATA_PAGES * 4096 + rng.below(4096),
            96..98 => READ_ONLY + rng.below(4096 - size.min(4096) + 1),
            98 => DATA - 1 - rng.below(size + 8),
            _ => 0x4000_0000_0000_0000 | rng.any() >> 8,
        }
    }

    /// Sets registers (or the displacement in `bytes`) so that the memory operand lies at `target`.
    fn aim(&mut self, bytes: &mut [u8], instruction: &Instruction, state: &mut State, target: u64) {
        let base = instruction.memory_base();
        let index = instruction.memory_index();
        let segment = match instruction.memory_segment() {
            Register::FS => state.fs,
            Register::GS => state.gs,
            _ => 0,
        };
        let narrow = self.options.bitness == 32 || base.is_gpr32() || index.is_gpr32();
        let wanted = target.wrapping_sub(segment);
        let displacement = instruction.memory_displacement64();
        let rng = &mut self.rng;
        let garbage = rng.any() << 32;
        let mut put = |register: Register, value: u64| {
            state.gpr[number(register)] = if narrow { value & 0xffff_ffff | garbage } else { value };
        };
        let rest = wanted.wrapping_sub(displacement);
        let scale = u64::from(instruction.memory_index_scale());
        if instruction.is_ip_rel_memory_operand() || base == Register::None && index == Register::None {
            patch_displacement(bytes, instruction, self.options.bitness, wanted);
        } else if index.is_vector_register() {
            let size = rng.pick(&[4usize, 8]);
            let spread = rng.pick(&[16i64, 256, 2048]);
            let image = &mut state.xsave;
            let n = index.number();
            for at in (0..16).step_by(size) {
                for half in [160 + n * 16, 576 + n * 16] {
                    if n < 16 {
                        let value = rng.below(2 * spread as u64) as i64 - spread;
                        image[half + at..half + at + size].copy_from_slice(&value.to_le_bytes()[..size]);
                    }
                }
            }
            if base == Register::None {
                patch_displacement(bytes, instruction, self.options.bitness, wanted);
            } else {
                put(base, rest);
            }
        } else if index == Register::None {
            put(base, rest);
        } else if base == Register::None {
            put(index, ((rest as i64) >> scale.trailing_zeros()) as u64);
        } else if number(base) == number(index) {
            put(base, rest / (1 + scale));
        } else {
            let value = if rng.chance(50) { rng.below(64) } else { rng.integer() };
            let value = if narrow { value & 0xffff_ffff } else { value };
            put(index, value);
            put(base, rest.wrapping_sub(value.wrapping_mul(scale)));
        }
    }

    /// A case for `code`, or `None` if no encoding was found.
    pub fn of(&mut self, code: Code, slot: usize) -> Option<Case> {
        let address = self.place(slot);
        let bitness = self.options.bitness;
        let plan = Plan { bitness, address, addressing: Addressing::Any, prefixes: true };
        let (mut bytes, instruction) = encode(&mut self.rng, code, &plan)?;
        let mut state = self.state();
        let mut patches = Vec::new();
        let memory = (0..instruction.op_count()).any(|n| instruction.op_kind(n) == OpKind::Memory);
        self.implicit(&instruction, &mut state);
        let size = match instruction.memory_size().size() as u64 {
            0 => 64,
            size => size,
        };
        let size = match instruction.mnemonic() {
            M::Xsave | M::Xsave64 | M::Xrstor | M::Xrstor64 => 832,
            _ => size,
        };
        let mut target = self.target(size, instruction.has_lock_prefix());
        if size > 256 && self.rng.chance(75) {
            target = target / 64 * 64;
        }
        if memory && (instruction.mnemonic() != M::Lea || self.rng.chance(50)) {
            self.aim(&mut bytes, &instruction, &mut state, target);
        }
        let instruction = decode(&bytes, bitness, address)?;
        let to_itself = |target: u64| (address..address + bytes.len() as u64).contains(&target);
        if leaves_line(&instruction) && to_itself(instruction.near_branch_target()) {
            return None;
        }
        if takes_state_mask(&instruction)
            && (state.gpr[0] & 0xffff_ffff | state.gpr[2] << 32) & !self.options.xcr0 != 0
        {
            return None; // the host's XCR0 may have more than the guest's
        }
        self.contents(&instruction, &mut state, target, &mut patches);
        let undefined = undefined(&instruction);
        Some(Case {
            bitness,
            address,
            jumps: leaves_line(&instruction),
            state: masked(state, bitness),
            patches,
            undefined,
            x87: records_x87(&instruction),
            code: bytes,
        })
    }

    /// Registers that an instruction uses without naming them.
    fn implicit(&mut self, instruction: &Instruction, state: &mut State) {
        let rng = &mut self.rng;
        let stack = DATA + 0x1000 + rng.below(0x2000) / 8 * 8;
        let stack = if rng.chance(85) { stack } else { stack + rng.below(8) };
        if instruction.is_stack_instruction() || matches!(instruction.mnemonic(), M::Leave | M::Enter) {
            state.gpr[4] = stack;
            state.gpr[5] = if rng.chance(90) { DATA + 0x1800 + rng.below(0x800) } else { rng.any() };
        }
        let garbage = if self.options.bitness == 64 { 0 } else { rng.any() << 32 };
        if instruction.is_string_instruction() {
            let count = match rng.below(12) {
                0 => 0,
                1 => 1 << rng.below(48),
                2 => rng.below(0x400),
                _ => rng.below(40),
            };
            state.gpr[1] = count | garbage;
            let any = |rng: &mut Rng| match rng.below(8) {
                0 => DATA + 0x1000 * (1 + rng.below(3)) - rng.below(9),
                1 => DATA + rng.below(DATA_PAGES * 4096 + 8),
                _ => DATA + 0x1000 + rng.below(0x2000),
            };
            (state.gpr[6], state.gpr[7]) = (any(rng) | garbage, any(rng) | garbage);
            if rng.chance(10) {
                state.gpr[7] = state.gpr[6].wrapping_add(rng.below(32));
            }
        }
        match instruction.mnemonic() {
            M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu => state.gpr[7] = DATA + 0x1000 + rng.below(0x2010),
            M::Xlatb => state.gpr[3] = DATA + 0x1000 + rng.below(0x1000),
            M::Div | M::Idiv if rng.chance(70) => {
                state.gpr[2] = if rng.chance(70) { 0 } else { u64::MAX };
                state.gpr[0] = if state.gpr[2] == 0 { rng.any() >> 1 } else { rng.any() | 1 << 63 };
                if rng.chance(30) {
                    state.gpr[0] &= 0x3fff;
                }
            }
            M::Xsave | M::Xsave64 | M::Xrstor | M::Xrstor64 => {
                state.gpr[0] = rng.any() & 7 & self.options.xcr0;
                state.gpr[2] = 0;
            }
            M::Loop | M::Loope | M::Loopne | M::Jrcxz | M::Jecxz if rng.chance(60) => {
                state.gpr[1] = rng.below(3);
            }
            _ => {}
        }
        for n in 0..instruction.op_count() {
            if instruction.op_kind(n) != OpKind::Register {
                continue;
            }
            let register = instruction.op_register(n);
            match instruction.mnemonic() {
                // A bit offset reaches far; keep most near.
                M::Bt | M::Bts | M::Btr | M::Btc if n == 1 && rng.chance(85) => {
                    state.gpr[number(register)] = (rng.below(0x2000) as i64 - 0x1000) as u64;
                }
                M::Mov if register.is_segment_register() => {
                    let other = instruction.op_register(1 - n);
                    if n == 0 && is_general(other) {
                        state.gpr[number(other)] = selector(rng);
                    }
                }
                M::Jmp | M::Call => state.gpr[number(register)] = landing(rng, instruction.ip()),
                M::Wrfsbase | M::Wrgsbase | M::Ldmxcsr if rng.chance(70) => {
                    state.gpr[number(register)] >>= 17;
                }
                _ => {}
            }
        }
    }

    /// Memory contents that an instruction wants.
    fn contents(
        &mut self,
        instruction: &Instruction,
        state: &mut State,
        at: u64,
        out: &mut Vec<(u64, Vec<u8>)>,
    ) {
        let mask = if self.options.bitness == 64 { u64::MAX } else { 0xffff_ffff };
        let stack = state.gpr[4] & mask;
        let rng = &mut self.rng;
        let mut put = |address: u64, bytes: &[u8]| {
            let end = DATA + DATA_PAGES * 4096;
            if (DATA..end).contains(&address) {
                out.push((address, bytes[..bytes.len().min((end - address) as usize)].to_vec()));
            }
        };
        match instruction.mnemonic() {
            M::Ret => put(stack, &landing(rng, instruction.ip()).to_le_bytes()),
            M::Jmp | M::Call if instruction.op0_kind() == OpKind::Memory => {
                put(at, &landing(rng, instruction.ip()).to_le_bytes());
            }
            M::Popf | M::Popfd | M::Popfq => {
                // TF traps after the next instruction, which differs on the two sides; NT is the host kernel's.
                put(stack, &(rng.any() & !(rflags::TF | rflags::NT | 0x8000)).to_le_bytes());
            }
            M::Pop if instruction.op0_register().is_segment_register() => {
                put(stack, &selector(rng).to_le_bytes());
            }
            M::Mov if instruction.op0_register().is_segment_register() => {
                put(at, &selector(rng).to_le_bytes());
            }
            M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss => {
                let offset = instruction.memory_size().size() as u64;
                put(at + offset.saturating_sub(2), &selector(rng).to_le_bytes()[..2]);
            }
            M::Ldmxcsr | M::Vldmxcsr if rng.chance(80) => {
                put(at, &(rng.any() as u32 & 0xffff).to_le_bytes());
            }
            M::Fxrstor | M::Fxrstor64 | M::Xrstor | M::Xrstor64 => {
                let mut image = Box::new([0; XSAVE]);
                self.vectors(&mut image);
                let rng = &mut self.rng;
                if rng.chance(10) {
                    image[26] = 1;
                }
                image[512] &= rng.any() as u8;
                if rng.chance(10) {
                    let n = 513 + rng.below(63) as usize;
                    image[n] = 1;
                }
                put(at, &image[..832]);
            }
            _ => {}
        }
    }
}

/// Cuts registers to what `bitness`-bit code can have at its start.
fn masked(mut state: State, bitness: u32) -> State {
    if bitness == 32 {
        for gpr in &mut state.gpr {
            *gpr &= 0xffff_ffff;
        }
        state.gpr[8..].fill(0);
    }
    state
}

fn selector(rng: &mut Rng) -> u64 {
    rng.pick(&[0, 1, 2, 3, 0x2b, 0x2b, 0x2b, 0x18, 0x10, 0x33, 0x1_002b, 0x7ff0])
}

/// Somewhere among the breakpoints around `ip`, or where nothing is.
fn landing(rng: &mut Rng, ip: u64) -> u64 {
    match rng.below(20) {
        0 => DATA + DATA_PAGES * 4096 + rng.below(4096),
        1 => 0x4000_0000_0000_0000 | rng.any() >> 8,
        _ => ip + 16 + rng.below(100),
    }
}

fn patch_displacement(bytes: &mut [u8], instruction: &Instruction, bitness: u32, wanted: u64) {
    let mut decoder = Decoder::with_ip(bitness, bytes, instruction.ip(), DecoderOptions::NONE);
    let again = decoder.decode();
    let place = decoder.get_constant_offsets(&again);
    let value = if instruction.is_ip_rel_memory_operand() {
        wanted.wrapping_sub(instruction.next_ip())
    } else {
        wanted
    };
    if place.has_displacement() {
        let (at, size) = (place.displacement_offset(), place.displacement_size());
        bytes[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
    }
}

/// Reads EDX:EAX as a set of state components.
fn takes_state_mask(instruction: &Instruction) -> bool {
    matches!(instruction.mnemonic(), M::Xsave | M::Xsave64 | M::Xrstor | M::Xrstor64)
}

/// May stand in a sequence: runs on, and its effects are all compared.
fn is_calm(code: Code) -> bool {
    let info = code.op_code();
    let flows = {
        let mut instruction = Instruction::new();
        instruction.set_code(code);
        instruction.flow_control() == FlowControl::Next
    };
    flows
        && !info.must_be_cpl0()
        && !info.is_input_output()
        && !code.is_string_instruction()
        && !matches!(
            code.mnemonic(),
            M::Enter
                | M::Leave
                | M::Popf
                | M::Popfd
                | M::Popfq
                | M::Cli
                | M::Sti
                | M::Wrfsbase
                | M::Wrgsbase
                | M::Xlatb
                | M::Maskmovq
                | M::Maskmovdqu
                | M::Vmaskmovdqu
                | M::Lfs
                | M::Lgs
                | M::Lss
                | M::Lds
                | M::Les
                | M::Xsave
                | M::Xsave64
                | M::Xrstor
                | M::Xrstor64
                | M::Fxrstor
                | M::Fxrstor64
                | M::Bt
                | M::Bts
                | M::Btr
                | M::Btc
                | M::Ldmxcsr
                | M::Vldmxcsr
                | M::Fldenv
                | M::Frstor
                | M::Fnstenv
                | M::Fnsave
                | M::Fxsave
                | M::Fxsave64
                | M::Fldcw
        )
}

impl Generator {
    /// A case of several instructions with jumps among them, for code slot `slot`.
    pub fn sequence(&mut self, slot: usize) -> Case {
        let address = self.place(slot);
        let bitness = self.options.bitness;
        let registers = if bitness == 64 { 16 } else { 8 };
        // A base, an index and a loop counter (RCX for LOOP) that nothing in the sequence writes.
        let base = loop {
            let base = self.rng.below(registers) as u8;
            if base != 4 && base != 1 {
                break base;
            }
        };
        let index = loop {
            let index = self.rng.below(registers) as u8;
            if index != base && index != 4 && index != 1 {
                break index;
            }
        };
        let looping = self.rng.chance(30);
        let mut parts: Vec<(Vec<u8>, Option<usize>)> = Vec::new(); // bytes; how many parts a jump skips
        // Flags that are undefined where we stand; around a loop, any may be.
        let mut unknown = if looping { rflags::ARITH } else { 0 };
        let mut conditional = 0; // parts that a jump may skip
        let (mut undefined_after, mut x87) = (0, false);
        let count = 2 + self.rng.below(10) as usize;
        let mut length = 0;
        for _ in 0..count * 8 {
            if parts.len() >= count || length > 90 {
                break;
            }
            let at = address + length as u64;
            if self.rng.chance(15) {
                let condition = self.rng.below(16) as u8;
                let jump = decode(&[0x70 | condition, 0], bitness, at);
                if jump.is_none_or(|jump| flags(jump.rflags_read()) & unknown != 0) {
                    continue;
                }
                let skip = 1 + self.rng.below(3) as usize;
                parts.push((vec![0x70 | condition, 0], Some(skip)));
                conditional = conditional.max(skip + 1);
                length += 2;
                continue;
            }
            let addressing = Addressing::Fixed { base, index };
            let plan = Plan { bitness, address: at, addressing, prefixes: false };
            let code = self.rng.pick(&self.calm);
            let Some((bytes, instruction)) = encode(&mut self.rng, code, &plan) else { continue };
            let kept = [base, index, if looping { 1 } else { base }];
            if flags(instruction.rflags_read()) & unknown != 0 || !self.fits(&instruction, &kept) {
                continue;
            }
            conditional = conditional.saturating_sub(1);
            if conditional == 0 && !may_leave_flags(&instruction) {
                unknown &= !flags(instruction.rflags_modified());
            }
            unknown |= undefined(&instruction);
            undefined_after |= undefined(&instruction);
            x87 |= records_x87(&instruction);
            length += bytes.len();
            parts.push((bytes, None));
        }
        let starts: Vec<usize> = parts
            .iter()
            .scan(0, |at, (bytes, _)| {
                let start = *at;
                *at += bytes.len();
                Some(start)
            })
            .collect();
        let mut code = Vec::new();
        for (n, (bytes, skip)) in parts.iter().enumerate() {
            code.extend_from_slice(bytes);
            if let Some(skip) = skip {
                let to = starts.get(n + 1 + skip).copied().unwrap_or(length);
                if let Some(last) = code.last_mut() {
                    *last = (to - starts[n] - 2) as u8;
                }
            }
        }
        let mut state = self.state();
        state.gpr[usize::from(base)] =
            DATA + 0x2000 + self.rng.below(0x200) * if self.rng.chance(70) { 16 } else { 3 };
        state.gpr[usize::from(index)] = self.rng.below(24);
        state.gpr[4] = DATA + 0x1000 + self.rng.below(0x40) * 8;
        if looping && code.len() < 120 {
            state.gpr[1] = 1 + self.rng.below(4);
            code.push(if unknown & rflags::ZF != 0 { 0xe2 } else { self.rng.pick(&[0xe0, 0xe1, 0xe2]) });
            code.push((-(code.len() as i64) - 1) as u8);
        }
        Case {
            bitness,
            address,
            code,
            jumps: false,
            state: masked(state, bitness),
            patches: Vec::new(),
            undefined: undefined_after,
            x87,
        }
    }

    /// Writes none of `kept` nor RSP (but by pushing and popping).
    fn fits(&mut self, instruction: &Instruction, kept: &[u8]) -> bool {
        let stack = instruction.is_stack_instruction();
        let info = self.info.info(instruction);
        let writes = info.used_registers().iter().any(|used| {
            let written = !matches!(
                used.access(),
                OpAccess::Read | OpAccess::CondRead | OpAccess::None | OpAccess::NoMemAccess
            );
            let register = used.register();
            let general = register.is_gpr();
            let kept = general
                && (kept.iter().any(|n| usize::from(*n) == number(register))
                    || !stack && number(register) == 4);
            written
                && (kept || register.is_segment_register() || stack && general && is_rsp_target(instruction))
        });
        !writes
    }
}

/// POP RSP and kin.
fn is_rsp_target(instruction: &Instruction) -> bool {
    instruction.op_count() > 0
        && instruction.op0_kind() == OpKind::Register
        && instruction.op0_register().is_gpr()
        && number(instruction.op0_register()) == 4
}
