//! [`Machine`]: a whole machine, from its configuration to its outcome.

use std::sync::Arc;

use wardian_backend::Output;
use wardian_gdb::{Address, Door};

use crate::assemble::assemble;
use crate::config::{Config, Endpoint, Plan};
use crate::diary::Diary;
use crate::ending::Ending;
use crate::engine::{self, Chosen};
use crate::error::{MachineError, Outcome};
use crate::host::{Attached, InputRoute, Outputs};
use crate::lifecycle::{Control, Runner};
use crate::stats::Stats;

/// A machine that is built and has not run yet, or has run.
pub struct Machine {
    runner: Runner,
    ending: Arc<Ending>,
    route: InputRoute,
    terminal: bool,
    debugger: Option<Address>,
    diary: Arc<Diary>,
    engine: Chosen,
    engine_reason: String,
}

impl Machine {
    /// Builds the machine that `config` describes: loads the kernel, opens the disks, makes the devices, and
    /// only then creates what is to be created (output files, the debugger's socket).
    ///
    /// # Errors
    /// See [`MachineError`]; [`MachineError::status`] says whose fault it is.
    pub fn build(config: Config) -> Result<Machine, MachineError> {
        let plan = config.check()?;
        let (ending, route) = (Ending::new(), InputRoute::default());
        let terminal = plan.serial == Endpoint::Stdio || plan.console == Endpoint::Stdio;
        let (engine, engine_reason) = engine::decide(&plan)?;
        let debugger = plan.gdb.clone();
        let (no_reboot, held) = (plan.no_reboot, plan.gdb_wait);
        let (diary, events) = (Diary::new(), plan.events.clone());
        let assemble = maker(plan, engine.clone(), Arc::clone(&ending), route.clone(), Arc::clone(&diary));
        let mut runner = Runner::new(assemble, held, no_reboot, Arc::clone(&ending))?;
        if let Some(path) = events {
            diary.write_to(Output::file(&path).map_err(|source| MachineError::Output { path, source })?);
        }
        let mut opened = None;
        if let Some(address) = &debugger {
            let door = Door::listen(address)?;
            opened = Some(door.address().clone());
            runner.set_door(door);
        }
        Ok(Machine { runner, ending, route, terminal, debugger: opened, diary, engine, engine_reason })
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

    /// A way to pause, look at and end the machine from other threads.
    #[must_use]
    pub fn control(&self) -> Control {
        self.runner.control()
    }

    /// Runs the machine on threads of its own until it ends. Meanwhile standard input belongs to the guest,
    /// if a device of its has it, the first SIGINT, SIGTERM, SIGQUIT or SIGHUP ends the machine, SIGUSR1 pauses
    /// it and SIGUSR2 lets it go on.
    pub fn run(&mut self) -> Outcome {
        let attached = match Attached::attach(self.terminal, &self.route, &self.ending, self.control()) {
            Ok(attached) => attached,
            Err(error) => return Outcome::Failed(error),
        };
        let outcome = self.runner.run();
        self.route.set(None);
        drop(attached);
        self.diary.drain();
        outcome
    }

    /// What was counted.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.runner.stats(self.engine.name())
    }
}

/// Makes the machine of `plan` as often as it is reset. Outputs are opened once.
fn maker(
    plan: Plan,
    chosen: Chosen,
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
            None => Ok(opened.insert(Outputs::open(&plan)?).clone()),
        };
        assemble(&plan, chosen.clone(), &ending, outputs, &route, &diary, held)
    })
}
