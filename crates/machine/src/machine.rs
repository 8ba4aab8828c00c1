//! [`Machine`]: a whole machine, from its configuration to its outcome.

use std::sync::Arc;

use wardian_backend::Output;
use wardian_gdb::{Address, Door};

use crate::about::About;
use crate::assemble::assemble;
use crate::config::{Config, Endpoint, Plan};
use crate::control::Control;
use crate::diary::{Diary, Happening};
use crate::ending::Ending;
use crate::engine::{self, Chosen};
use crate::error::{MachineError, Outcome};
use crate::host::{Attached, InputRoute, Keyboard, Outputs, Seat};
use crate::lifecycle::{Begin, Runner};
use crate::stats::Stats;

/// A machine that is built and has not run yet, or has run.
pub struct Machine {
    runner: Runner,
    ending: Arc<Ending>,
    route: InputRoute,
    /// A device of the guest uses the terminal.
    terminal: bool,
    /// The terminal is not the process's own.
    detached: bool,
    about: About,
    debugger: Option<Address>,
    diary: Arc<Diary>,
    engine_reason: String,
}

impl Machine {
    /// Builds the machine that `config` describes: loads the kernel, opens the disks, makes the devices, and
    /// only then creates what is to be created (output files, the debugger's socket).
    ///
    /// # Errors
    /// See [`MachineError`]; [`MachineError::status`] says whose fault it is.
    pub fn build(config: Config) -> Result<Machine, MachineError> {
        Machine::build_at(config, Seat::default())
    }

    /// Likewise, with its terminal at `seat`.
    ///
    /// # Errors
    /// Likewise.
    pub fn build_at(config: Config, seat: Seat) -> Result<Machine, MachineError> {
        let plan = config.check()?;
        let (ending, route) = (Ending::new(), InputRoute::default());
        let terminal = plan.serial == Endpoint::Stdio || plan.console == Endpoint::Stdio;
        let (engine, engine_reason) = engine::decide(&plan)?;
        let debugger = plan.gdb.clone();
        let begin = Begin { held: plan.gdb_wait, paused: plan.paused, engine: engine.name() };
        let (no_reboot, about) = (plan.no_reboot, About::of(&plan));
        let (diary, events) = (Diary::new(), plan.events.clone());
        let detached = seat.detached;
        let assemble = maker(plan, engine, seat, Arc::clone(&ending), route.clone(), Arc::clone(&diary));
        let mut runner = Runner::new(assemble, begin, no_reboot, Arc::clone(&ending))?;
        if let Some(path) = events {
            diary.write_to(Output::file(&path).map_err(|source| MachineError::Output { path, source })?);
        }
        let mut opened = None;
        if let Some(address) = &debugger {
            let door = Door::listen(address)?;
            opened = Some(door.address().clone());
            runner.set_door(door);
        }
        Ok(Machine {
            runner,
            ending,
            route,
            terminal,
            detached,
            about,
            debugger: opened,
            diary,
            engine_reason,
        })
    }

    /// From now on `listener` gets what happens to the machine, on whichever thread it happens. It must not
    /// wait for the machine.
    pub fn on_event(&self, listener: impl Fn(&crate::Event) + Send + Sync + 'static) {
        self.diary.listen(Box::new(listener));
    }

    /// One line that says which engine was taken and why.
    #[must_use]
    pub fn engine_reason(&self) -> &str {
        &self.engine_reason
    }

    /// Where a debugger can attach: the address that was asked for, with the port that was taken.
    #[must_use]
    pub fn debugger(&self) -> Option<&Address> {
        self.debugger.as_ref()
    }

    /// What the machine is made of.
    #[must_use]
    pub fn about(&self) -> &About {
        &self.about
    }

    /// The keyboard of the machine's terminal, if a device of the guest has that.
    #[must_use]
    pub fn keyboard(&self) -> Option<Keyboard> {
        self.terminal.then(|| Keyboard(self.route.clone()))
    }

    /// A way to pause, look at and end the machine from other threads.
    #[must_use]
    pub fn control(&self) -> Control {
        self.runner.control()
    }

    /// Runs the machine on threads of its own until it ends. Meanwhile standard input belongs to the guest,
    /// if a device of its has it, the first SIGINT, SIGTERM, SIGQUIT or SIGHUP ends the machine, SIGUSR1 pauses
    /// it and SIGUSR2 lets it go on.
    pub fn run(&mut self) -> Outcome {
        let terminal = self.terminal && !self.detached;
        let attached = match Attached::attach(terminal, &self.route, &self.ending, self.control()) {
            Ok(attached) => attached,
            Err(error) => return Outcome::Failed(error),
        };
        let outcome = self.runner.run();
        self.route.set(None);
        drop(attached);
        let what = Happening::Ended { status: outcome.status() };
        self.diary.tell(self.runner.guest_time(), false, outcome.to_string(), what);
        self.diary.drain();
        outcome
    }

    /// What was counted.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.control().stats()
    }
}

/// Makes the machine of `plan` as often as it is reset. Outputs are opened once.
fn maker(
    plan: Plan,
    chosen: Chosen,
    seat: Seat,
    ending: Arc<Ending>,
    route: InputRoute,
    diary: Arc<Diary>,
) -> crate::lifecycle::Assemble {
    let mut opened: Option<Outputs> = None;
    Box::new(move |held| {
        if let Some(outputs) = &opened {
            outputs.drain();
        }
        let outputs = || match &opened {
            Some(outputs) => Ok(outputs.clone()),
            None => Ok(opened.insert(Outputs::open(&plan, &seat)?).clone()),
        };
        assemble(&plan, chosen.clone(), &ending, outputs, &route, &diary, held)
    })
}
