//! Emission of control flow: jumps and their chaining, stack operations, TLB probes and the cold stubs behind them.

use iced_x86::{Instruction, Mnemonic as M};

use super::native::raw;
use super::{ALL_FLAGS, Cold, Emit, Loc, Next, Op, Source, counter_size, straight};
use crate::access::Site;
use crate::blocks::Mark;
use crate::core::seg;
use crate::ctx::{self, Leave};
use crate::decode::{Class, Field};
use crate::emit::{host_of, reg, reg::T0, reg::T1, scratch, slot};
impl Emit<'_> {
    /// The linear address `linear` into register `to`, computed from the page's base if the block floats.
    pub(super) fn place(&mut self, to: u8, linear: u64, wide: bool) {
        if self.base == 0 {
            self.c.mov_imm(to, if wide { linear } else { linear & 0xffff_ffff });
        } else {
            self.c.load_base(to, self.base);
            let by = linear.wrapping_sub(self.page_linear) as i64;
            self.c.add(to, if wide { by } else { i64::from(by as i32) }, wide);
        }
    }

    /// A direct jump to another page. Flags must be in the slot.
    fn go_far(&mut self, target: u64) {
        if self.base == 0 {
            self.c.mov_imm(T0, target);
            self.c.jump_slot(ctx::jumps(self.mode.view()), ctx::jump_slot(target));
            return;
        }
        // Until it is linked it compares with what no page has.
        self.place(T0, target & !0xfff, true);
        let compare = self.c.cmp_base(T0, 0);
        self.c.put(&[0x0f, 0x85]);
        let site = self.c.pos();
        self.c.put(&[0, 0, 0, 0, 0xe9, 0, 0, 0, 0]);
        self.cold.push(Cold::Link { site, compare, target });
    }

    /// `mov r13, rip; jmp leave`.
    pub(super) fn leave(&mut self, why: Leave, rip: u64) {
        self.place(T0, rip, true);
        let target = self.thunks.leave[why as usize];
        self.c.jmp(target);
    }

    pub(super) fn save_if(&mut self, live: u32) {
        if live != 0 && self.loc == Loc::Eflags {
            self.c.save_flags();
            self.loc = Loc::Both;
        }
    }

    /// Before flags are clobbered: keep what is live.
    pub(super) fn clobber(&mut self, live: u32) {
        self.save_if(live);
        self.loc = Loc::Slot;
    }

    /// Ends a path: to `target` with `live` flags wanted there.
    pub(super) fn go(&mut self, target: u64, live: u32) {
        self.save_if(live);
        if self.mode.single() {
            self.leave(Leave::Completed, target);
        } else if self.chainable && target & !0xfff == self.page_linear {
            // Patched to the target once that exists.
            self.c.put(&[0xe9, 0, 0, 0, 0]);
            let site = self.c.pos() - 4;
            self.cold.push(Cold::Edge { site, target, save: false, left: 0 });
        } else {
            self.go_far(target);
        }
    }

    /// Emits one instruction; says whether it ended the block.
    pub(super) fn op(&mut self, op: &Op, source: &Source) -> bool {
        let insn = &op.insn;
        let rip = self.mode.linear(insn.ip());
        let next = self.mode.linear(insn.next_ip());
        match op.info.class {
            Class::Unknown | Class::Interpret => {
                self.save_if(ALL_FLAGS);
                let valid = !self.mode.single() && straight(insn, op.info, self.mode);
                match &mut self.straight {
                    Some(list) if valid => {
                        let number = list.add(*insn, rip, self.base, op.start == 0);
                        self.c.mov_imm(T1, u64::from(number));
                        let target = self.thunks.straight;
                        self.c.jmp(target);
                    }
                    _ => self.leave(Leave::Interpret, rip),
                }
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
                self.check(op.live_before(), rip, size, true, false, seg::SS, false);
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
                self.check(op.live_before(), rip, size, true, false, seg::SS, false);
                self.c.lea(reg::GSP, Some(reg::GBP), None, size as i32, wide);
                self.pair_load(reg::GBP);
            }
            Class::CallNear => {
                let target = self.mode.linear(insn.near_branch_target());
                self.push(op, rip, Next::Linear(target), |e| e.pair_store_return(insn.next_ip()));
                self.go(target, op.live_after);
                return true;
            }
            Class::CallIndirect => {
                self.branch_operand(op, source, rip);
                self.c.store(scratch(0), T0);
                self.push(op, rip, Next::Scratch, |e| e.pair_store_return(insn.next_ip()));
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
                self.check(0, rip, size, true, false, seg::SS, false);
                self.pair_load(T0);
                self.bump_sp(size as i32 + extra);
                self.go_indirect(size as i32 + extra);
                return true;
            }
            Class::System => return self.system(op, source, rip, next),
            Class::Native => self.native(op, source, rip, next),
        }
        false
    }

    /// After the opcode of a jump was emitted: its displacement, leading to `target`.
    pub(super) fn side_exit(&mut self, target: u64, live: u32) {
        let site = self.c.pos();
        self.c.put(&[0; 4]);
        let save = live != 0 && self.loc == Loc::Eflags;
        self.cold.push(Cold::Edge { site, target, save, left: self.left.saturating_sub(1) });
    }

    /// To the linear address in R13. Flags that are live must have been saved.
    pub(super) fn go_indirect(&mut self, moved: i32) {
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

    pub(super) fn stack_size(&self) -> usize {
        if self.mode.code64() { 8 } else { 4 }
    }

    /// Address of the top of the stack into R13.
    pub(super) fn top_of_stack(&mut self) {
        if self.mode.code64() {
            self.c.mov(T0, reg::GSP);
        } else {
            self.c.mov32(T0, reg::GSP);
        }
    }

    pub(super) fn bump_sp(&mut self, by: i32) {
        self.c.lea(reg::GSP, Some(reg::GSP), None, by, self.mode.code64());
    }

    /// `mov [r14 + r13], host` of the stack's size.
    pub(super) fn pair_store(&mut self, host: u8) {
        let w = u8::from(self.mode.code64()) << 3;
        self.c.put(&[0x43 | w | (host >> 3) << 2, 0x89, (host & 7) << 3 | 4, 0x2e]);
    }
    /// `mov host, [r14 + r13]`, zero-extended.
    pub(super) fn pair_load(&mut self, host: u8) {
        let w = u8::from(self.mode.code64()) << 3;
        self.c.put(&[0x43 | w | (host >> 3) << 2, 0x8b, (host & 7) << 3 | 4, 0x2e]);
    }
    /// `mov [r13], host`.
    pub(super) fn single_store(&mut self, host: u8) {
        let w = u8::from(self.mode.code64()) << 3;
        self.c.put(&[0x41 | w | (host >> 3) << 2, 0x89, 0x45 | (host & 7) << 3, 0]);
    }
    pub(super) fn pair_store_imm(&mut self, value: u64) {
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

    /// The return address `ip` of a call.
    pub(super) fn pair_store_return(&mut self, ip: u64) {
        if self.base == 0 {
            return self.pair_store_imm(ip);
        }
        self.c.merge();
        self.place(T1, ip, true);
        self.single_store(T1);
    }

    /// A push: check, `store`, move the stack pointer.
    pub(super) fn push(&mut self, op: &Op, rip: u64, next: Next, store: impl Fn(&mut Self)) {
        let size = self.stack_size();
        let live = if op.info.class == Class::CallIndirect { ALL_FLAGS } else { op.live_before() };
        self.c.lea(T0, Some(reg::GSP), None, -(size as i32), self.mode.code64());
        let index = self.check(live, rip, size, false, true, seg::SS, false);
        store(self);
        self.bump_sp(-(size as i32));
        self.finish(index, next, op.live_after);
    }

    /// Probes the linear address (or the offset, in a segment that is not flat) in R13. Returns the number of the cold
    /// item, whose tail is set by [`Emit::finish`] for writes.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn check(
        &mut self,
        live: u32,
        rip: u64,
        size: usize,
        read: bool,
        write: bool,
        segment: usize,
        checked: bool,
    ) -> usize {
        self.clobber(live);
        let access =
            Site::new(rip, size, read, write, segment, checked).unwrap_or(Site(rip)).floating(self.base);
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
        let (tag, left) = ((!checked).then_some(tag), self.left);
        self.cold.push(Cold::Access { site, access, tag, back, tail: None, left });
        self.cold.len() - 1
    }

    /// Everything that must be repeated when the write of cold item `index` is slow has been emitted.
    pub(super) fn finish(&mut self, index: usize, next: Next, live: u32) {
        let end = self.c.pos();
        let save = live != 0 && self.loc == Loc::Eflags;
        if let Cold::Access { tail, .. } = &mut self.cold[index] {
            *tail = Some((end, next, save));
        }
    }

    pub(super) fn cold_stub(&mut self, item: Cold) {
        let here = self.c.pos();
        match item {
            Cold::Quit { site, why, rip } => {
                self.c.memory().patch(site, here);
                self.leave(why, rip);
            }
            Cold::Link { site, compare, target } => {
                self.c.memory().patch(site, here);
                self.c.add(T0, (target & 0xfff) as i64, true);
                self.c.mov_imm(T1, u64::from(compare));
                let leave = self.thunks.leave[Leave::Edge as usize];
                self.c.jmp(leave);
            }
            Cold::High { site, back } => {
                self.c.memory().patch(site, here);
                let load = self.thunks.load_high;
                self.c.call(load);
                self.c.jmp(back);
            }
            Cold::Budget { site, count, rip } => {
                self.c.memory().patch(site, here);
                self.c.give_back(count);
                self.leave(Leave::Budget, rip);
            }
            Cold::Edge { site, target, save, left } => {
                self.c.memory().patch(site, here);
                self.loc = Loc::Eflags;
                let mut chain = site;
                if save {
                    self.c.save_flags();
                }
                self.c.give_back(left);
                if self.mode.single() {
                    self.leave(Leave::Completed, target);
                    return;
                }
                if !(self.chainable && target & !0xfff == self.page_linear) {
                    self.go_far(target);
                    return;
                }
                if save || left != 0 {
                    self.c.put(&[0xe9, 0, 0, 0, 0]); // to the next instruction until chained
                    chain = self.c.pos() - 4;
                }
                self.place(T0, target, true);
                self.c.mov_imm(T1, u64::from(chain));
                let leave = self.thunks.leave[Leave::Chain as usize];
                self.c.jmp(leave);
            }
            Cold::Access { site, access, tag, back, tail, left } => {
                self.c.memory().patch(site, here);
                if let Some(tag) = tag {
                    self.c.xor_tag(tag);
                }
                if left != 0 {
                    self.c.note_left(left);
                }
                self.c.put(&[0x49, 0xbe]); // mov r14, imm64
                self.c.put(&access.0.to_le_bytes());
                let slow = self.thunks.slow;
                self.c.call(slow);
                self.c.jmp(back);
                if let Some((end, next, save)) = tail {
                    let at = self.c.pos();
                    self.c.repeat(back, end - back);
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
                    self.c.give_back(left.saturating_sub(1));
                    match next {
                        Next::Linear(rip) => self.place(T0, rip, true),
                        Next::Scratch => self.c.load(T0, scratch(0)),
                    }
                    let leave = self.thunks.leave[Leave::Completed as usize];
                    self.c.jmp(leave);
                }
            }
        }
    }
}

/// Value that a PUSH of an immediate stores, sign-extended.
pub(super) fn push_value(insn: &Instruction) -> u64 {
    insn.immediate(0)
}

/// iced's condition code (1 = overflow ...) to the processor's (0 = overflow ...).
pub(super) fn condition(cc: u8) -> u8 {
    cc.wrapping_sub(1) & 15
}
