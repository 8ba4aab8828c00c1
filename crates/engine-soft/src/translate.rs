//! The translator: guest instructions to host instructions, one superblock at a time.
//!
//! A superblock is decoded through not-taken conditional jumps until a jump, call, return, interpreted
//! instruction, page end or [`MAX_INSNS`]. Instructions are copied byte for byte with their registers mapped and
//! their memory operand replaced by `[r14 + r13]` after a TLB probe. See `engine.md`, "The design".
//!
//! **Flags.** At every block entry the architectural flags are in the context's slot. Inside a block they are in the
//! slot, in EFLAGS or in both ([`Loc`]); they are saved before the first probe that would lose flags somebody
//! may still read, and restored before an instruction that reads them. A target on the same page whose code
//! overwrites all flags before reading any needs none (peek-ahead).

use iced_x86::{
    Decoder, DecoderError, DecoderOptions, Instruction, Mnemonic as M, OpKind, Register, RflagsBits,
};
use wardian_memory::PAGE_SIZE;

use crate::access::{Site, address_size, is_canonical, operand_segment};
use crate::blocks::{Block, BlockId, Blocks, Mark};
use crate::code::{CODE_LEN, COLD_START, CodeMemory, MARGIN};
use crate::core::{Core, seg};
use crate::ctx::{self, Leave};
use crate::decode::{Class, CodeInfo, CodeTable, Field, Raw, Unit};
use crate::emit::{Cursor, host_of, reg, reg::T0, reg::T1, scratch, seg_base, slot};
use crate::mode::Mode;
use crate::thunks::{self, Thunks};
use crate::trap::Result;

/// Most instructions in a superblock.
pub const MAX_INSNS: usize = 64;
/// Most instructions that are looked ahead for flags.
const PEEK: usize = 8;
const ALL_FLAGS: u32 =
    RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;

/// Where the architectural flags are while a block is emitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Loc {
    Slot,
    Eflags,
    Both,
}

#[derive(Clone)]
struct Op {
    insn: Instruction,
    info: CodeInfo,
    /// Offset of the bytes in the buffer.
    start: usize,
    reads: u32,
    kills: u32,
    modifies: u32,
    /// Flags that somebody may read after this instruction (on the path that falls through).
    live_after: u32,
    /// ... on the taken edge.
    live_taken: u32,
}

impl Op {
    fn live_before(&self) -> u32 {
        (self.live_after & !self.kills) | self.reads | self.live_taken
    }
}

/// What a cold stub does.
#[derive(Clone, Copy)]
enum Cold {
    Access {
        /// Displacement of the `ja` (or `jmp`) that leads here.
        site: u32,
        access: Site,
        /// Tag table to take off again; `None`: R13 holds the address.
        tag: Option<i32>,
        /// Hot code to go back to, and for writes the hot bytes to be repeated before the commit.
        back: u32,
        tail: Option<(u32, Next, bool)>,
    },
    Edge {
        site: u32,
        target: u64,
        save: bool,
    },
    /// Load the upper vector registers.
    High {
        site: u32,
        back: u32,
    },
}

/// Where a committed write goes on if translated code must be left.
#[derive(Clone, Copy)]
enum Next {
    Linear(u64),
    Scratch,
}

/// The translator of one vCPU and what it has translated.
pub struct Translator {
    pub code: CodeMemory,
    pub thunks: Thunks,
    pub blocks: Blocks,
    table: CodeTable,
    hot: u32,
    cold: u32,
}

/// Linear memory bytes that a superblock is decoded from.
struct Source {
    bytes: [u8; 1024 + 16],
    len: usize,
}

struct Emit<'a> {
    c: Cursor<'a>,
    mode: Mode,
    thunks: Thunks,
    loc: Loc,
    cold: Vec<Cold>,
    marks: Vec<Mark>,
    cold_marks: Vec<Mark>,
    page_linear: u64,
    chainable: bool,
    /// Number that the block will have.
    id: BlockId,
    moved: i32,
}

impl Translator {
    pub fn new(ram_pages: usize) -> std::result::Result<Translator, wardian_cpu::EngineError> {
        let mut code = CodeMemory::new()?;
        let thunks = thunks::write(&mut code)?;
        Ok(Translator {
            code,
            thunks,
            blocks: Blocks::new(ram_pages),
            table: CodeTable::new(),
            hot: thunks.end,
            cold: COLD_START,
        })
    }

    /// Bytes of code in use.
    pub fn used(&self) -> u32 {
        (self.hot - self.thunks.end) + (self.cold - COLD_START)
    }

    /// Whether another superblock fits.
    pub fn has_room(&self) -> bool {
        self.hot + MARGIN < COLD_START && self.cold + MARGIN < CODE_LEN
    }

    /// Forgets every translation. No pointer into the code may be used after this.
    pub fn clear(&mut self) {
        self.blocks.clear();
        self.hot = self.thunks.end;
        self.cold = COLD_START;
    }

    /// Makes blocks that depend on `granules` of RAM page `page` unreachable.
    pub fn invalidate(&mut self, page: u32, granules: u64) -> usize {
        let mut count = 0;
        let (code, lookup) = (&mut self.code, self.thunks.leave[Leave::Lookup as usize]);
        self.blocks.kill(page, granules, |block| {
            count += 1;
            jump_at(code, block.landing, lookup);
            jump_at(code, block.head, block.attention);
        });
        count
    }

    /// Translates the superblock at `linear`. `stops`: addresses that no block may run into.
    ///
    /// # Errors
    /// The fetch's page fault.
    pub fn translate(&mut self, core: &mut Core, linear: u64, mode: Mode, stops: &[u64]) -> Result<BlockId> {
        loop {
            let fetch = core.fetch_page(linear)?;
            let offset = (linear & (PAGE_SIZE - 1)) as usize;
            let mut source = Source { bytes: [0; 1040], len: (4096 - offset).min(1024) };
            read_host(fetch.host + offset, &mut source.bytes[..source.len]);
            let mut ops = Vec::with_capacity(24);
            self.decode(&source, linear, mode, stops, &mut ops);
            let mut second = None;
            if ops.is_empty() {
                // The first instruction reaches into the next page.
                let next = core.fetch_page((linear | 0xfff).wrapping_add(1))?;
                read_host(next.host, &mut source.bytes[source.len..source.len + 16]);
                let first = source.len;
                source.len += 16;
                self.decode(&source, linear, mode, stops, &mut ops);
                ops.truncate(1);
                second = Some((next, first));
            }
            let used = ops.last().map_or(1, |op: &Op| op.start + op.insn.len());
            let peeked = self.liveness(&mut ops, fetch.host, linear, mode, second.is_none());

            // Mark first, then look whether somebody wrote in between.
            let on_first = second.map_or(used, |(_, first)| first.min(used));
            let mut granules = granule_mask(offset, offset + on_first);
            core.mark_translated(fetch.page, fetch.host, offset..offset + on_first);
            if let Some(range) = peeked {
                granules |= granule_mask(range.0, range.1);
                core.mark_translated(fetch.page, fetch.host, range.0..range.1);
            }
            if let Some((next, first)) = second
                && used > first
            {
                core.mark_translated(next.page, next.host, 0..used - first);
            }
            let mut again = [0u8; 1040];
            read_host(fetch.host + offset, &mut again[..on_first]);
            if let Some((next, first)) = second
                && used > first
            {
                read_host(next.host, &mut again[first..used]);
            }
            if again[..used] != source.bytes[..used] {
                continue;
            }

            let mut block = Blocks::blank(fetch.page as u32, offset as u16, linear, mode);
            block.granules = granules;
            block.page2 = second.map(|(next, _)| next.page as u32);
            core.counters.translations += 1;
            core.counters.translated_instructions += ops.len() as u64;
            self.emit(&mut block, &ops, &source, used);
            let crossing = second
                .filter(|(_, first)| used > *first)
                .map(|(next, first)| (next.page as u32, granule_mask(0, used - first)));
            let (head, forward) = (block.head, block.page2.is_none());
            let (id, old) = self.blocks.add(block);
            if let Some((page, granules)) = crossing {
                self.blocks.add_crossing(id, page, granules);
            }
            if let Some(old) = old
                && forward
            {
                // Jumps that were chained to the old block go on to the new one.
                let old_head = self.blocks.all[old as usize].head;
                jump_at(&mut self.code, old_head, head);
            }
            return Ok(id);
        }
    }

    fn decode(&mut self, source: &Source, linear: u64, mode: Mode, stops: &[u64], ops: &mut Vec<Op>) {
        let ip = mode.ip(linear);
        let mut decoder =
            Decoder::with_ip(mode.bitness(), &source.bytes[..source.len], ip, DecoderOptions::NONE);
        let limit = if mode.single() { 1 } else { MAX_INSNS };
        while ops.len() < limit {
            let start = decoder.position();
            if start >= source.len {
                return;
            }
            if !ops.is_empty()
                && !stops.is_empty()
                && stops.contains(&mode.linear(ip.wrapping_add(start as u64)))
            {
                return;
            }
            let insn = decoder.decode();
            let info = if insn.is_invalid() {
                if decoder.last_error() == DecoderError::NoMoreBytes && source.len - start < 15 {
                    return;
                }
                CodeInfo { class: Class::Interpret, ..CodeInfo::default() }
            } else {
                treatment(&mut self.table, &insn, mode)
            };
            let class = info.class;
            let mut op = Op {
                reads: insn.rflags_read() & ALL_FLAGS,
                kills: (insn.rflags_written()
                    | insn.rflags_cleared()
                    | insn.rflags_set()
                    | insn.rflags_undefined())
                    & ALL_FLAGS,
                modifies: insn.rflags_modified() & ALL_FLAGS,
                insn,
                info,
                start,
                live_after: 0,
                live_taken: 0,
            };
            if info.by_cl {
                op.reads |= op.modifies;
                op.kills = 0;
            }
            if matches!(class, Class::Interpret | Class::Syscall) {
                (op.reads, op.kills, op.modifies) = (ALL_FLAGS, 0, 0);
            }
            ops.push(op);
            match class {
                Class::Interpret
                | Class::Syscall
                | Class::JmpNear
                | Class::JmpIndirect
                | Class::CallNear
                | Class::CallIndirect
                | Class::Ret => return,
                _ => {}
            }
        }
    }

    /// Fills in which flags are live where; returns the range of page offsets that was looked at beyond the block.
    fn liveness(
        &mut self,
        ops: &mut [Op],
        host: usize,
        linear: u64,
        mode: Mode,
        peek: bool,
    ) -> Option<(usize, usize)> {
        let page = linear & !0xfff;
        let mut seen: Option<(usize, usize)> = None;
        let mut live_at = |this: &mut Translator, target: u64| -> u32 {
            if !peek || mode.single() || target & !0xfff != page {
                return ALL_FLAGS;
            }
            let offset = (target & 0xfff) as usize;
            let (live, end) = this.peek(host, offset, target, mode);
            let range = seen.get_or_insert((offset, end));
            range.0 = range.0.min(offset);
            range.1 = range.1.max(end);
            live
        };
        let last = ops.last()?;
        let end = mode.linear(mode.ip(linear).wrapping_add((last.start + last.insn.len()) as u64));
        let mut live = match last.info.class {
            Class::JmpNear | Class::CallNear => {
                let target = mode.linear(last.insn.near_branch_target());
                live_at(self, target)
            }
            Class::Interpret | Class::Syscall | Class::JmpIndirect | Class::CallIndirect | Class::Ret => {
                ALL_FLAGS
            }
            _ => live_at(self, end),
        };
        for op in ops.iter_mut().rev() {
            op.live_after = live;
            if matches!(op.info.class, Class::Jcc | Class::Loop | Class::Jrcxz) {
                op.live_taken = live_at(self, mode.linear(op.insn.near_branch_target()));
            }
            live = op.live_before();
        }
        seen
    }

    /// Which flags may be read from `target` on before they are written; and where the look ended (page offset).
    fn peek(&mut self, host: usize, offset: usize, target: u64, mode: Mode) -> (u32, usize) {
        let mut bytes = [0u8; 64];
        let len = (4096 - offset).min(64);
        read_host(host + offset, &mut bytes[..len]);
        let mut decoder =
            Decoder::with_ip(mode.bitness(), &bytes[..len], mode.ip(target), DecoderOptions::NONE);
        let (mut pending, mut live) = (ALL_FLAGS, 0);
        for _ in 0..PEEK {
            let insn = decoder.decode();
            if insn.is_invalid() {
                break;
            }
            let info = self.table.get(&insn);
            live |= insn.rflags_read() & pending;
            match info.class {
                Class::Native
                | Class::Nothing
                | Class::Lea
                | Class::PushReg
                | Class::PushImm
                | Class::PopReg
                | Class::Leave => {}
                _ => break,
            }
            if !info.by_cl {
                pending &= !(insn.rflags_written()
                    | insn.rflags_cleared()
                    | insn.rflags_set()
                    | insn.rflags_undefined());
            }
            if pending == 0 {
                return (live, offset + decoder.position());
            }
        }
        (live | pending, (offset + decoder.position()).max(offset + 1).min(4096))
    }

    fn emit(&mut self, block: &mut Block, ops: &[Op], source: &Source, used: usize) {
        let hot = (self.hot + 15) & !15;
        let mode = block.mode;
        let lookup = self.thunks.leave[Leave::Lookup as usize];
        let mut e = Emit {
            c: Cursor::new(&mut self.code, hot),
            mode,
            thunks: self.thunks,
            loc: Loc::Slot,
            cold: Vec::with_capacity(16),
            marks: Vec::new(),
            cold_marks: Vec::new(),
            page_linear: block.linear & !0xfff,
            chainable: block.page2.is_none() && !mode.single(),
            id: self.blocks.all.len() as BlockId,
            moved: 0,
        };
        // Landing: is this the address that the jump wanted?
        block.landing = e.c.pos();
        let linear = block.linear;
        if linear as i64 == i64::from(linear as i32) {
            e.c.put(&[0x49, 0x81, 0xfd]); // cmp r13, imm32
            e.c.put(&(linear as u32).to_le_bytes());
        } else {
            e.c.mov_imm(T1, linear);
            e.c.put(&[0x4d, 0x39, 0xf5]); // cmp r13, r14
        }
        e.c.jcc(5, lookup);
        block.head = e.c.pos();
        e.c.cmp_attention();
        e.c.put(&[0x0f, 0x85]);
        let attention_site = e.c.pos();
        e.c.put(&[0; 4]);
        block.body = e.c.pos();
        let evex = |op: &&Op| op.info.class == Class::Native && op.info.unit == Unit::Evex;
        if ops.iter().filter(evex).any(|op| op.info.wide) {
            e.c.widen();
        }
        if ops.iter().any(|op| evex(&op)) {
            // The flags are in their slot here.
            let site = e.c.need_high();
            let back = e.c.pos();
            e.cold.push(Cold::High { site, back });
        }
        let mut ended = false;
        for op in ops {
            ended = e.op(op, source);
        }
        if !ended {
            let next = mode.linear(mode.ip(linear).wrapping_add(used as u64));
            let live = ops.last().map_or(ALL_FLAGS, |op| op.live_after);
            e.go(next, live);
        }
        block.end = e.c.pos();
        block.moved = e.moved;
        block.last = ops.last().map_or(linear, |op| mode.linear(op.insn.ip()));
        // Cold stubs.
        let cold_at = (self.cold + 15) & !15;
        let cold = std::mem::take(&mut e.cold);
        e.c.seek(cold_at);
        block.attention = e.c.pos();
        e.c.memory().patch(attention_site, cold_at);
        e.leave(Leave::Attention, linear);
        for item in cold {
            e.cold_stub(item);
        }
        let cold_end = e.c.pos();
        e.c.seek(cold_end);
        let (marks, cold_marks) = (std::mem::take(&mut e.marks), std::mem::take(&mut e.cold_marks));
        self.hot = block.end;
        self.cold = cold_end;
        self.blocks.marks[0].extend(marks);
        self.blocks.marks[1].extend(cold_marks);
    }
}

/// Writes `jmp target` at `at`.
fn jump_at(code: &mut CodeMemory, at: u32, target: u32) {
    let mut bytes = [0xe9, 0, 0, 0, 0];
    bytes[1..].copy_from_slice(&target.wrapping_sub(at.wrapping_add(5)).to_le_bytes());
    code.put(at, &bytes);
}

fn granule_mask(start: usize, end: usize) -> u64 {
    let (first, last) = (start / 64, (end.max(start + 1) - 1) / 64);
    (u64::MAX >> (63 - last.min(63))) & (u64::MAX << first.min(63))
}

/// Copies guest RAM bytes.
fn read_host(host: usize, out: &mut [u8]) {
    // SAFETY: callers pass an address inside a RAM page and a length that stays in it; the guest may write
    // meanwhile, which is noticed by comparing again after marking.
    unsafe { std::ptr::copy_nonoverlapping(host as *const u8, out.as_mut_ptr(), out.len()) };
}

/// Whether `unit` is switched off in `mode`.
pub fn gated(unit: Unit, mode: Mode) -> bool {
    match unit {
        Unit::Integer => false,
        Unit::X87 => mode.fpu_off(),
        Unit::Sse => mode.fpu_off() || mode.sse_off(),
        Unit::Avx => mode.fpu_off() || mode.avx_off(),
        Unit::Evex => mode.fpu_off() || mode.evex_off(),
    }
}

/// How `insn` is treated in `mode`: its attributes, with the class that the mode allows.
pub fn treatment(table: &mut CodeTable, insn: &Instruction, mode: Mode) -> CodeInfo {
    let mut info = table.get(insn);
    let wait = insn.mnemonic() == M::Wait && mode.wait_off();
    if wait || (info.class != Class::Nothing && gated(info.unit, mode)) {
        info.class = Class::Interpret;
    }
    adapt(insn, &mut info, mode);
    let direct =
        matches!(info.class, Class::JmpNear | Class::CallNear | Class::Jcc | Class::Loop | Class::Jrcxz);
    if direct && mode.code64() && !is_canonical(insn.near_branch_target()) {
        info.class = Class::Interpret;
    }
    info
}

/// Takes back classes that the mode does not allow to be emitted.
fn adapt(insn: &Instruction, info: &mut CodeInfo, mode: Mode) {
    let emitted = match info.class {
        Class::PushReg | Class::PushImm | Class::PopReg | Class::Leave => {
            // Only stack operations of the mode's own size.
            let moved = insn.stack_pointer_increment().unsigned_abs();
            let word = insn.op_count() > 0 && insn.op0_register().size() == 2;
            let own = moved.is_multiple_of(if mode.code64() { 8 } else { 4 });
            mode.stack_native() && own && !word && !operand16(insn)
        }
        Class::CallNear | Class::CallIndirect | Class::Ret => mode.stack_native() && !operand16(insn),
        Class::JmpIndirect => mode.near_native() && !operand16(insn),
        Class::JmpNear | Class::Jcc | Class::Loop | Class::Jrcxz => {
            let natural = match mode.bitness() {
                16 => OpKind::NearBranch16,
                32 => OpKind::NearBranch32,
                _ => OpKind::NearBranch64,
            };
            insn.op0_kind() == natural && counter_size(insn) != 2
        }
        Class::Native if info.mem_read || info.mem_write => {
            crate::access::SIZES.contains(&(insn.memory_size().size() as u16)) && !insn.is_vsib()
        }
        _ => true,
    };
    if !emitted {
        info.class = Class::Interpret;
    }
}

/// Size of the counter of LOOP and JrCXZ: by the address size. 8 for others.
fn counter_size(insn: &Instruction) -> usize {
    use iced_x86::Code as C;
    match insn.code() {
        C::Loop_rel8_16_CX | C::Loop_rel8_32_CX | C::Jcxz_rel8_16 | C::Jcxz_rel8_32 => 2,
        C::Loop_rel8_16_ECX
        | C::Loop_rel8_32_ECX
        | C::Loop_rel8_64_ECX
        | C::Jecxz_rel8_16
        | C::Jecxz_rel8_32
        | C::Jecxz_rel8_64 => 4,
        _ => 8,
    }
}

fn operand16(insn: &Instruction) -> bool {
    let op = insn.code().op_code();
    op.operand_size() == 16
}

impl Emit<'_> {
    /// `mov r13, rip; jmp leave`.
    fn leave(&mut self, why: Leave, rip: u64) {
        self.c.mov_imm(T0, rip);
        let target = self.thunks.leave[why as usize];
        self.c.jmp(target);
    }

    fn save_if(&mut self, live: u32) {
        if live != 0 && self.loc == Loc::Eflags {
            self.c.save_flags();
            self.loc = Loc::Both;
        }
    }

    /// Before flags are clobbered: keep what is live.
    fn clobber(&mut self, live: u32) {
        self.save_if(live);
        self.loc = Loc::Slot;
    }

    /// Ends a path: to `target` with `live` flags wanted there.
    fn go(&mut self, target: u64, live: u32) {
        self.save_if(live);
        if self.mode.single() {
            self.leave(Leave::Completed, target);
        } else if self.chainable && target & !0xfff == self.page_linear {
            // Patched to the target once that exists.
            self.c.put(&[0xe9, 0, 0, 0, 0]);
            let site = self.c.pos() - 4;
            self.cold.push(Cold::Edge { site, target, save: false });
        } else {
            self.c.mov_imm(T0, target);
            self.c.jump_slot(ctx::jumps(self.mode.view()), ctx::jump_slot(target));
        }
    }

    /// Emits one instruction; says whether it ended the block.
    fn op(&mut self, op: &Op, source: &Source) -> bool {
        let insn = &op.insn;
        let rip = self.mode.linear(insn.ip());
        let next = self.mode.linear(insn.next_ip());
        match op.info.class {
            Class::Unknown | Class::Interpret => {
                self.save_if(ALL_FLAGS);
                self.leave(Leave::Interpret, rip);
                return true;
            }
            Class::Syscall => {
                self.save_if(ALL_FLAGS);
                self.leave(if self.mode.single() { Leave::Interpret } else { Leave::Syscall }, rip);
                return true;
            }
            Class::Nothing => {
                if insn.mnemonic() == M::Pause {
                    self.c.put(&[0xf3, 0x90]);
                }
            }
            Class::Lea => self.lea(op),
            Class::JmpNear => {
                self.go(self.mode.linear(insn.near_branch_target()), op.live_after);
                return true;
            }
            Class::Jcc => {
                if self.loc == Loc::Slot {
                    self.c.restore_flags();
                    self.loc = Loc::Both;
                }
                let cc = insn.condition_code() as u8;
                self.c.put(&[0x0f, 0x80 | condition(cc)]);
                self.side_exit(self.mode.linear(insn.near_branch_target()), op.live_taken);
            }
            Class::Loop | Class::Jrcxz => {
                let wide = counter_size(insn);
                if op.info.class == Class::Loop {
                    self.c.lea(reg::RCX, Some(reg::RCX), None, -1, wide == 8);
                }
                // jrcxz taken (2+2 bytes); jmp over; taken: jmp edge
                let prefix: &[u8] = if wide == 4 { &[0x67] } else { &[] };
                self.c.put(prefix);
                if op.info.class == Class::Loop {
                    self.c.put(&[0xe3, 5]); // zero: do not loop
                    self.c.put(&[0xe9]);
                    self.side_exit(self.mode.linear(insn.near_branch_target()), op.live_taken);
                } else {
                    self.c.put(&[0xe3, 2, 0xeb, 5, 0xe9]);
                    self.side_exit(self.mode.linear(insn.near_branch_target()), op.live_taken);
                }
            }
            Class::PushReg => {
                let guest = raw(op, source, self.mode).field(Field::Opcode);
                self.push(op, rip, Next::Linear(next), |e| match host_of(guest) {
                    Some(host) => e.pair_store(host),
                    None => {
                        e.c.merge();
                        e.c.load(T1, slot(guest));
                        e.single_store(T1);
                    }
                });
            }
            Class::PushImm => {
                let value = push_value(insn);
                self.push(op, rip, Next::Linear(next), |e| e.pair_store_imm(value));
            }
            Class::PopReg => {
                let guest = raw(op, source, self.mode).field(Field::Opcode);
                let size = self.stack_size();
                self.top_of_stack();
                self.check(op.live_before(), rip, size, true, false, seg::SS, None);
                match host_of(guest) {
                    Some(reg::GSP) => self.pair_load(reg::GSP),
                    Some(host) => {
                        self.pair_load(host);
                        self.bump_sp(size as i32);
                    }
                    None => {
                        self.pair_load(T1);
                        self.c.store(slot(guest), T1);
                        self.bump_sp(size as i32);
                    }
                }
            }
            Class::Leave => {
                let size = self.stack_size();
                let wide = self.mode.code64();
                if wide {
                    self.c.mov(T0, reg::GBP);
                } else {
                    self.c.mov32(T0, reg::GBP);
                }
                self.check(op.live_before(), rip, size, true, false, seg::SS, None);
                self.c.lea(reg::GSP, Some(reg::GBP), None, size as i32, wide);
                self.pair_load(reg::GBP);
            }
            Class::CallNear => {
                let target = self.mode.linear(insn.near_branch_target());
                self.push(op, rip, Next::Linear(target), |e| e.pair_store_imm(insn.next_ip()));
                self.go(target, op.live_after);
                return true;
            }
            Class::CallIndirect => {
                self.branch_operand(op, source, rip);
                self.c.store(scratch(0), T0);
                self.push(op, rip, Next::Scratch, |e| e.pair_store_imm(insn.next_ip()));
                self.c.load(T0, scratch(0));
                self.go_indirect(-8);
                return true;
            }
            Class::JmpIndirect => {
                self.branch_operand(op, source, rip);
                self.go_indirect(0);
                return true;
            }
            Class::Ret => {
                let size = self.stack_size();
                let extra = if insn.op_count() > 0 { i32::from(insn.immediate16()) } else { 0 };
                self.clobber(ALL_FLAGS);
                self.top_of_stack();
                self.check(0, rip, size, true, false, seg::SS, None);
                self.pair_load(T0);
                self.bump_sp(size as i32 + extra);
                self.go_indirect(size as i32 + extra);
                return true;
            }
            Class::Native => self.native(op, source, rip, next),
        }
        false
    }

    /// After the opcode of a jump was emitted: its displacement, leading to `target`.
    fn side_exit(&mut self, target: u64, live: u32) {
        let site = self.c.pos();
        self.c.put(&[0; 4]);
        let save = live != 0 && self.loc == Loc::Eflags;
        self.cold.push(Cold::Edge { site, target, save });
    }

    /// To the linear address in R13. Flags that are live must have been saved.
    fn go_indirect(&mut self, moved: i32) {
        self.moved = moved;
        self.save_if(ALL_FLAGS);
        if self.mode.single() {
            let target = self.thunks.leave[Leave::Completed as usize];
            self.c.jmp(target);
        } else {
            if self.mode.code64() {
                self.c.note_source(self.id);
            }
            self.c.jump_indirect(ctx::jumps(self.mode.view()));
        }
    }

    fn stack_size(&self) -> usize {
        if self.mode.code64() { 8 } else { 4 }
    }

    /// Address of the top of the stack into R13.
    fn top_of_stack(&mut self) {
        if self.mode.code64() {
            self.c.mov(T0, reg::GSP);
        } else {
            self.c.mov32(T0, reg::GSP);
        }
    }

    fn bump_sp(&mut self, by: i32) {
        self.c.lea(reg::GSP, Some(reg::GSP), None, by, self.mode.code64());
    }

    /// `mov [r14 + r13], host` of the stack's size.
    fn pair_store(&mut self, host: u8) {
        let w = u8::from(self.mode.code64()) << 3;
        self.c.put(&[0x43 | w | (host >> 3) << 2, 0x89, (host & 7) << 3 | 4, 0x2e]);
    }
    /// `mov host, [r14 + r13]`, zero-extended.
    fn pair_load(&mut self, host: u8) {
        let w = u8::from(self.mode.code64()) << 3;
        self.c.put(&[0x43 | w | (host >> 3) << 2, 0x8b, (host & 7) << 3 | 4, 0x2e]);
    }
    /// `mov [r13], host`.
    fn single_store(&mut self, host: u8) {
        let w = u8::from(self.mode.code64()) << 3;
        self.c.put(&[0x41 | w | (host >> 3) << 2, 0x89, 0x45 | (host & 7) << 3, 0]);
    }
    fn pair_store_imm(&mut self, value: u64) {
        if !self.mode.code64() || value as i64 == i64::from(value as i32) {
            let w = u8::from(self.mode.code64()) << 3;
            self.c.put(&[0x43 | w, 0xc7, 0x04, 0x2e]);
            self.c.put(&(value as u32).to_le_bytes());
        } else {
            self.c.merge();
            self.c.mov_imm(T1, value);
            self.single_store(T1);
        }
    }

    /// A push: check, `store`, move the stack pointer.
    fn push(&mut self, op: &Op, rip: u64, next: Next, store: impl Fn(&mut Self)) {
        let size = self.stack_size();
        let live = if op.info.class == Class::CallIndirect { ALL_FLAGS } else { op.live_before() };
        self.c.lea(T0, Some(reg::GSP), None, -(size as i32), self.mode.code64());
        let index = self.check(live, rip, size, false, true, seg::SS, None);
        store(self);
        self.bump_sp(-(size as i32));
        self.finish(index, next, op.live_after);
    }

    /// Probes the linear address (or the offset, in a segment that is not flat) in R13. Returns the number of the cold
    /// item, whose tail is set by [`Emit::finish`] for writes.
    #[allow(clippy::too_many_arguments)]
    fn check(
        &mut self,
        live: u32,
        rip: u64,
        size: usize,
        read: bool,
        write: bool,
        segment: usize,
        checked: Option<()>,
    ) -> usize {
        self.clobber(live);
        let checked = checked.is_some();
        let access = Site::new(rip, size, read, write, segment, checked).unwrap_or(Site(rip));
        let view = self.mode.view();
        let tag = if write { ctx::tag_write(view) } else { ctx::tag_read(view) };
        let site = if checked {
            self.c.put(&[0xe9]);
            let site = self.c.pos();
            self.c.put(&[0; 4]);
            site
        } else {
            self.c.probe(size as u16, tag, ctx::addend(view))
        };
        let back = self.c.pos();
        self.cold.push(Cold::Access { site, access, tag: (!checked).then_some(tag), back, tail: None });
        self.cold.len() - 1
    }

    /// Everything that must be repeated when the write of cold item `index` is slow has been emitted.
    fn finish(&mut self, index: usize, next: Next, live: u32) {
        let end = self.c.pos();
        let save = live != 0 && self.loc == Loc::Eflags;
        if let Cold::Access { tail, .. } = &mut self.cold[index] {
            *tail = Some((end, next, save));
        }
    }

    fn cold_stub(&mut self, item: Cold) {
        let here = self.c.pos();
        match item {
            Cold::High { site, back } => {
                self.c.memory().patch(site, here);
                let load = self.thunks.load_high;
                self.c.call(load);
                self.c.jmp(back);
            }
            Cold::Edge { site, target, save } => {
                self.c.memory().patch(site, here);
                self.loc = Loc::Eflags;
                let mut chain = site;
                if save {
                    self.c.save_flags();
                }
                if self.mode.single() {
                    self.leave(Leave::Completed, target);
                    return;
                }
                if !(self.chainable && target & !0xfff == self.page_linear) {
                    self.c.mov_imm(T0, target);
                    self.c.jump_slot(ctx::jumps(self.mode.view()), ctx::jump_slot(target));
                    return;
                }
                if save {
                    self.c.put(&[0xe9, 0, 0, 0, 0]); // to the next instruction until chained
                    chain = self.c.pos() - 4;
                }
                self.c.mov_imm(T0, target);
                self.c.mov_imm(T1, u64::from(chain));
                let leave = self.thunks.leave[Leave::Chain as usize];
                self.c.jmp(leave);
            }
            Cold::Access { site, access, tag, back, tail } => {
                self.c.memory().patch(site, here);
                if let Some(tag) = tag {
                    self.c.xor_tag(tag);
                }
                self.c.put(&[0x49, 0xbe]); // mov r14, imm64
                self.c.put(&access.0.to_le_bytes());
                let slow = self.thunks.slow;
                self.c.call(slow);
                self.c.jmp(back);
                if let Some((end, next, save)) = tail {
                    let at = self.c.pos();
                    let bytes = self.c.memory().bytes(back, end - back).to_vec();
                    for chunk in bytes.chunks(16) {
                        self.c.put(chunk);
                    }
                    let moved: Vec<Mark> = self
                        .marks
                        .iter()
                        .filter(|m| (back..end).contains(&m.host))
                        .map(|m| Mark { host: m.host - back + at, ..*m })
                        .collect();
                    self.cold_marks.extend(moved);
                    let commit = self.thunks.commit;
                    self.c.call(commit);
                    self.c.jmp(end);
                    if save {
                        self.c.save_flags();
                    }
                    match next {
                        Next::Linear(rip) => self.c.mov_imm(T0, rip),
                        Next::Scratch => self.c.load(T0, scratch(0)),
                    }
                    let leave = self.thunks.leave[Leave::Completed as usize];
                    self.c.jmp(leave);
                }
            }
        }
    }

    /// The effective address of `insn`'s memory operand in host register `to`. With `linear` the segment base is added.
    fn address(&mut self, insn: &Instruction, to: u8, linear: bool, wide_result: bool) {
        let code64 = self.mode.code64();
        let asize = address_size(insn, code64);
        let (base, index) = (insn.memory_base(), insn.memory_index());
        let disp = insn.memory_displacement64();
        let segment = operand_segment(insn, self.mode.code64());
        let add_base = linear && self.mode.based(segment);
        let wide = asize == 8 && wide_result;
        if base == Register::RIP
            || base == Register::EIP
            || (base == Register::None && index == Register::None)
        {
            let mut value = disp;
            if asize == 4 || !code64 {
                value &= 0xffff_ffff;
            }
            if asize == 2 {
                value &= 0xffff;
            }
            if !wide_result {
                value &= 0xffff_ffff;
            }
            self.c.mov_imm(to, value);
        } else {
            let place = |e: &mut Self, r: Register, temp: u8| {
                let guest = r.number() as u8;
                host_of(guest).unwrap_or_else(|| {
                    e.c.load(temp, slot(guest));
                    temp
                })
            };
            let b = (base != Register::None).then(|| place(self, base, T0));
            let i =
                (index != Register::None).then(|| (place(self, index, T1), insn.memory_index_scale() as u8));
            self.c.lea(to, b, i, disp as i32, wide);
            if asize == 2 {
                // movzx to, to16
                self.c.put(&[0x40 | (to >> 3) << 2 | to >> 3, 0x0f, 0xb7, 0xc0 | (to & 7) << 3 | (to & 7)]);
            }
        }
        if add_base {
            self.c.load(T1, seg_base(segment));
            self.c.lea(to, Some(to), Some((T1, 1)), 0, code64);
        }
    }

    fn lea(&mut self, op: &Op) {
        let insn = &op.insn;
        let dst = insn.op0_register();
        let guest = dst.number() as u8;
        let host = host_of(guest);
        match (dst.size(), host) {
            (2, _) => {
                self.address(insn, T0, false, true);
                match host {
                    Some(h) => self.c.put(&[0x66, 0x44 | h >> 3, 0x89, 0xe8 | h & 7]), // mov h16, r13w
                    None => {
                        self.c.put(&[0x66, 0x44, 0x89, 0x6d, slot(guest) as u8]); // mov [slot], r13w
                    }
                }
            }
            (size, Some(h)) => {
                // The destination may be the base or the index: LEA reads before it writes.
                self.address(insn, h, false, size == 8);
            }
            (size, None) => {
                self.address(insn, T0, false, size == 8);
                self.c.store(slot(guest), T0);
            }
        }
    }

    /// The target of an indirect jump or call into R13.
    fn branch_operand(&mut self, op: &Op, source: &Source, rip: u64) {
        let insn = &op.insn;
        self.clobber(ALL_FLAGS);
        if insn.op0_kind() == OpKind::Memory {
            let size = self.stack_size();
            self.operand_check(op, rip, size, true, false, 0);
            self.pair_load(T0);
        } else {
            let guest = raw(op, source, self.mode).field(Field::Rm);
            match host_of(guest) {
                Some(h) if self.mode.code64() => self.c.mov(T0, h),
                Some(h) => self.c.mov32(T0, h),
                None => self.c.load(T0, slot(guest)),
            }
        }
    }

    /// Address and probe of `op`'s memory operand.
    fn operand_check(&mut self, op: &Op, rip: u64, size: usize, read: bool, write: bool, live: u32) -> usize {
        let insn = &op.insn;
        let segment = operand_segment(insn, self.mode.code64());
        // A store through CS must fault.
        let flat = self.mode.flat(segment) && !(write && segment == seg::CS && !self.mode.code64());
        // The address is computed before the flags are saved: that needs R14, this R13 and R14.
        self.clobber(live);
        self.address(insn, T0, flat, true);
        let index = self.check(0, rip, size, read, write, segment, (!flat).then_some(()));
        if insn.has_op_mask()
            && let Cold::Access { access, .. } = &mut self.cold[index]
        {
            *access = access.with_mask();
        }
        index
    }

    /// An instruction that is emitted as itself.
    fn native(&mut self, op: &Op, source: &Source, rip: u64, next: u64) {
        let insn = &op.insn;
        let info = &op.info;
        let mut raw = raw(op, source, self.mode);
        let memory = info.mem_read || info.mem_write;
        let modifies = op.modifies != 0 || info.by_cl;
        let wanted = op.reads | if modifies { op.live_after & !op.kills } else { 0 };
        let mut index = None;
        if memory {
            let size = insn.memory_size().size();
            index = Some(self.operand_check(op, rip, size, info.mem_read, info.mem_write, op.live_before()));
        }
        let restore = wanted != 0 && self.loc == Loc::Slot;
        // Forms that 64-bit mode encodes differently.
        if raw.map == 0 && raw.vex.is_none() && raw.evex.is_none() {
            match raw.opcode {
                0x40..=0x4f if !self.mode.code64() => {
                    // INC/DEC r: FF /0, /1.
                    let (r, dec) = (raw.opcode & 7, raw.opcode >> 3 & 1);
                    raw.opcode = 0xff;
                    raw.modrm = Some(0xc0 | dec << 3 | r);
                }
                // An alias that 64-bit mode dropped.
                0x82 => raw.opcode = 0x80,
                0xa0..=0xa3 => {
                    // MOV with a plain offset: the forms with ModRM.
                    raw.opcode = [0x8a, 0x8b, 0x88, 0x89][(raw.opcode & 3) as usize];
                    raw.modrm = Some(0x04);
                    raw.imm = insn.len();
                }
                _ => {}
            }
        }
        let inc_dec_form = raw.map == 0 && raw.opcode == 0xff && info.gprs[0].field == Field::Opcode;
        // Where each general register operand goes.
        let mut fields: [(Field, u8, bool, bool); 4] = [(Field::None, 0, false, false); 4];
        let mut spilled: [(u8, u8, bool, bool); 3] = [(0, 0, false, false); 3]; // guest, host, load, written
        let mut spills = 0;
        let mut high = false;
        for (n, g) in info.gprs.iter().enumerate() {
            let field = if inc_dec_form && g.field == Field::Opcode { Field::Rm } else { g.field };
            if field == Field::None || (field == Field::Rm && raw.modrm.is_none_or(|m| m >> 6 != 3)) {
                continue;
            }
            let guest = raw.field(field);
            if g.byte && !raw.has_rex && (4..8).contains(&guest) {
                high = true;
                fields[n] = (field, guest, true, false);
                continue;
            }
            fields[n] = (field, guest, false, g.written);
            if host_of(guest).is_none() {
                let load = !(n == 0 && info.first_write_only);
                match spilled[..spills].iter_mut().find(|s| s.0 == guest) {
                    Some(s) => {
                        s.2 |= load;
                        s.3 |= g.written;
                    }
                    None if spills < 3 => {
                        spilled[spills] = (guest, 0, load, g.written);
                        spills += 1;
                    }
                    None => {}
                }
            }
        }
        let merged = memory && (spills > 0 || restore || high);
        if merged {
            self.c.merge();
        }
        if restore {
            self.c.restore_flags();
            self.loc = Loc::Both;
        }
        // Give spilled registers a host register.
        let mut temps: [Option<u8>; 4] =
            if memory { [Some(T1), None, None, None] } else { [Some(T0), Some(T1), None, None] };
        let mut borrowed = 0;
        let own = temps.iter().flatten().count();
        if spills > own {
            // Borrow registers that the instruction does not use.
            let used = used_registers(insn);
            let free = (0..12u8).filter(|r| *r != 4 && *r != 5 && used & (1 << r) == 0);
            for lender in free.take((spills - own).min(2)) {
                self.c.store(scratch(borrowed), lender);
                temps[own + borrowed] = Some(lender);
                borrowed += 1;
            }
        }
        let mut pool = temps.iter().flatten().copied();
        for s in &mut spilled[..spills] {
            s.1 = pool.next().unwrap_or(T1);
            if s.2 {
                self.c.load(s.1, slot(s.0));
            }
        }
        let host = |guest: u8| {
            host_of(guest)
                .unwrap_or_else(|| spilled[..spills].iter().find(|s| s.0 == guest).map_or(T1, |s| s.1))
        };
        // A high-byte register forbids REX: everything else must then be in a low register.
        let lender = reg::RSI;
        let mut lent = None;
        let mut map = |r: u8, e: &mut Self| {
            if high && r >= 8 {
                if lent.is_none() {
                    e.c.xchg(r, lender);
                    lent = Some(r);
                }
                lender
            } else {
                r
            }
        };
        let mut regs = [None; 5]; // by Field
        for (field, guest, is_high, _) in fields {
            if field == Field::None {
                continue;
            }
            let r = if is_high { guest } else { map(host(guest), self) };
            regs[field as usize] = Some(r);
        }
        let pointer = if memory { Some(if merged { map(T0, self) } else { T0 }) } else { None };
        if info.may_fault {
            self.marks.push(Mark { host: self.c.pos(), flags_live: self.loc != Loc::Slot, rip });
        }
        self.copy(&raw, &regs, pointer, merged, op, source, high);
        if let Some(r) = lent {
            self.c.xchg(r, lender);
        }
        for s in &spilled[..spills] {
            if s.3 {
                self.c.store(slot(s.0), s.1);
            }
        }
        for (n, lender) in temps[own..].iter().flatten().enumerate() {
            self.c.load(*lender, scratch(n));
        }
        if modifies {
            self.loc = Loc::Eflags;
        }
        if (info.mem_write || self.mode.watched())
            && let Some(index) = index
        {
            self.finish(index, Next::Linear(next), op.live_after);
        }
    }

    /// The bytes of the instruction with registers and memory operand replaced.
    #[allow(clippy::too_many_arguments)]
    fn copy(
        &mut self,
        raw: &Raw,
        regs: &[Option<u8>; 5],
        pointer: Option<u8>,
        merged: bool,
        op: &Op,
        source: &Source,
        high: bool,
    ) {
        let mut out = [0u8; 24];
        let mut n = 0;
        let mut put = |b: u8| {
            out[n] = b;
            n += 1;
        };
        let field = |f: Field, old: u8| regs[f as usize].unwrap_or(old);
        let reg_field = field(Field::Reg, raw.field(Field::Reg));
        let (mut x, mut b) = (0u8, 0u8);
        let mut tail = [0u8; 2];
        let mut tail_len = 0;
        let modrm = raw.modrm.map(|_| match pointer {
            Some(p) if !merged => {
                // [r14 + r13]
                debug_assert_eq!(p, T0);
                (x, b) = (1, 1);
                (tail[0], tail_len) = (0x2e, 1);
                (reg_field & 7) << 3 | 4
            }
            Some(p) => {
                // [p + 0]
                b = p >> 3;
                if p & 7 == 5 {
                    (tail[0], tail_len) = (0, 1);
                    0x40 | (reg_field & 7) << 3 | 5
                } else {
                    (reg_field & 7) << 3 | p & 7
                }
            }
            None => {
                let rm = field(Field::Rm, raw.field(Field::Rm));
                b = rm >> 3;
                // Vector registers keep their own high bits.
                0xc0 | (reg_field & 7) << 3 | rm & 7
            }
        });
        let mut opcode = raw.opcode;
        if let Some(r) = regs[Field::Opcode as usize]
            && raw.modrm.is_none()
        {
            opcode = opcode & 0xf8 | r & 7;
            b = r >> 3;
        }
        let r_bit = if raw.modrm.is_some() { reg_field >> 3 & 1 } else { 0 };
        if let Some([p0, p1, p2]) = raw.evex {
            // R', V', L'L, z, b and aaa stay; so does X where it extends a vector register.
            let vector_rm = pointer.is_none() && regs[Field::Rm as usize].is_none();
            let x = if vector_rm { raw.rex >> 1 & 1 } else { x };
            let p0 = if self.mode.code64() { p0 } else { p0 | 0x10 };
            put(0x62);
            put((1 - r_bit) << 7 | (1 - x) << 6 | (1 - b) << 5 | p0 & 0x1f);
            put(if self.mode.code64() { p1 } else { p1 | 0x40 });
            put(p2);
            put(opcode);
        }
        match raw.vex {
            _ if raw.evex.is_some() => {}
            Some((pp, l, vvvv)) => {
                let v = regs[Field::Vvvv as usize].unwrap_or(vvvv);
                put(0xc4);
                put((1 - r_bit) << 7 | (1 - x) << 6 | (1 - b) << 5 | raw.map);
                put((raw.rex & 8) << 4 | (!v & 15) << 3 | l << 2 | pp);
                put(opcode);
            }
            None => {
                let p66 = if self.mode.bitness() == 16 { op.info.wants_66 } else { raw.p66 };
                if p66 {
                    put(0x66);
                }
                if raw.rep != 0 {
                    put(raw.rep);
                }
                if raw.lock {
                    put(0xf0);
                }
                let rex = (raw.rex & 8) | r_bit << 2 | x << 1 | b;
                let byte_rex = raw.has_rex
                    || op.info.gprs.iter().any(|g| {
                        g.byte && g.field != Field::None && regs[g.field as usize].is_some_and(|r| r >= 4)
                    }) && !high;
                if rex != 0 || byte_rex {
                    put(0x40 | rex);
                }
                match raw.map {
                    1 => put(0x0f),
                    2 => {
                        put(0x0f);
                        put(0x38);
                    }
                    3 => {
                        put(0x0f);
                        put(0x3a);
                    }
                    _ => {}
                }
                put(opcode);
            }
        }
        if let Some(m) = modrm {
            put(m);
            for t in &tail[..tail_len] {
                put(*t);
            }
        }
        self.c.put(&out[..n]);
        let imm = &source.bytes[op.start + raw.imm..op.start + op.insn.len()];
        if !self.mode.code64()
            && let [selector] = imm
            && matches!(op.insn.mnemonic(), M::Vblendvps | M::Vblendvpd | M::Vpblendvb)
        {
            // Outside 64-bit mode the top bit of a register in an immediate does not count.
            self.c.put(&[selector & 0x7f]);
            return;
        }
        self.c.put(imm);
    }
}

fn raw(op: &Op, source: &Source, mode: Mode) -> Raw {
    let bytes = &source.bytes[op.start..op.start + op.insn.len()];
    let a16 = op.insn.memory_base().size() == 2
        || op.insn.memory_index().size() == 2
        || (mode.bitness() != 64
            && op.insn.memory_base() == Register::None
            && op.insn.memory_index() == Register::None
            && op.insn.memory_displ_size() == 2);
    Raw::parse(bytes, mode.code64(), a16)
}

/// Host numbers of all general registers that `insn` names or implies.
fn used_registers(insn: &Instruction) -> u32 {
    let mut factory = iced_x86::InstructionInfoFactory::new();
    let mut used = 0;
    for r in factory.info(insn).used_registers() {
        let full = r.register().full_register();
        if full.is_gpr() {
            used |= 1 << full.number();
        }
    }
    used
}

/// Value that a PUSH of an immediate stores, sign-extended.
fn push_value(insn: &Instruction) -> u64 {
    insn.immediate(0)
}

/// iced's condition code (1 = overflow ...) to the processor's (0 = overflow ...).
fn condition(cc: u8) -> u8 {
    cc.wrapping_sub(1) & 15
}
