//! Every order in which park, restore, quarantine, success, release and an operator's edit can meet, with crashes between
//! any two effects: however they meet, the registry ends as the item says, and no value is lost.

use super::device::{ATTRIBUTES, Device, Limits, Phase, Registered, Step};
use protocol::OperationId;
use protocol::recovery::Failure;
use stateright::{Checker, Model, Property};

const LIMITS: Limits = Limits { attempts: 1, cycles: 2 };
const ORIGINAL: &str = "original";
const EDITED: &str = "edited";

fn failure(number: i64) -> Failure {
    Failure {
        thing_name: "t".parse().unwrap(),
        operation_id: operation(number),
        timestamp: number,
        received_at: number,
        model: None,
        firmware: None,
    }
}

fn operation(number: i64) -> OperationId {
    format!("o-{number}").parse().unwrap()
}

/// What a process does to the item before it makes the registry follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Work {
    /// Park or quarantine: the item has been changed by retry-counter.
    Follow,
    /// That and before it the failure, by its number.
    Fail(i64),
    /// By the number of the failure.
    Restore(i64),
    Succeed(i64),
    Release(i64),
}

/// Where a process is: what it holds in its hands is from the past.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum At {
    Begin,
    ReadRegistry,
    ReadItem(Registered),
    Act(Device, Registered),
    End,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct State {
    device: Device,
    registered: Registered,
    processes: Vec<(Work, At)>,
    crashes: u8,
    edits: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Action {
    Go(usize),
    /// The process is killed, and begins again.
    Crash(usize),
    Edit,
}

struct Recovery {
    /// How many failures there have been.
    failures: i64,
    works: Vec<Work>,
    crashes: u8,
    edits: u8,
}

fn values(value: &str) -> Registered {
    let attributes = ATTRIBUTES.into_iter().map(|name| (name.to_owned(), value.to_owned()));
    Registered { version: 1, attributes: attributes.collect() }
}

impl State {
    fn go(&mut self, process: usize) {
        let (work, at) = self.processes[process].clone();
        self.processes[process].1 = match at {
            At::Begin => {
                self.begin(work);
                At::ReadRegistry
            }
            At::ReadRegistry => At::ReadItem(self.registered.clone()),
            At::ReadItem(registered) => At::Act(self.device.clone(), registered),
            At::Act(device, registered) => self.act(&device, &registered),
            At::End => At::End,
        };
        // Writes are told apart by their content here.
        self.device.revision = 0;
    }

    fn is_over(&self) -> bool {
        self.processes.iter().all(|(_, at)| *at == At::End)
    }

    fn value(&self, name: &str) -> &str {
        &self.registered.attributes[name]
    }

    fn begin(&mut self, work: Work) {
        match work {
            Work::Follow => {}
            Work::Fail(number) => _ = self.device.fail(&failure(number), LIMITS),
            Work::Restore(number) => _ = self.device.restore(&operation(number)),
            Work::Succeed(at) => _ = self.device.succeed(at, 0),
            Work::Release(at) => _ = self.device.release(at),
        }
    }

    fn act(&mut self, device: &Device, registered: &Registered) -> At {
        let Some(held) = &device.held else { return At::End };
        match device.next_step(registered) {
            Step::Done => return At::End,
            Step::Keep(attributes) => self.device.keep(&held.operation_id, &attributes),
            Step::Mark => self.device.mark(&held.operation_id),
            Step::Update { attributes, version } => {
                if self.registered.version == version {
                    self.registered.version += 1;
                    self.registered.attributes.extend(attributes);
                }
            }
        }
        At::ReadRegistry
    }
}

impl Model for Recovery {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let mut device = Device::default();
        for number in 1..=self.failures {
            device.fail(&failure(number), LIMITS);
        }
        let processes = self.works.iter().map(|work| (*work, At::Begin)).collect();
        vec![State { device, registered: values(ORIGINAL), processes, crashes: self.crashes, edits: self.edits }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        for (process, (_, at)) in state.processes.iter().enumerate() {
            if *at != At::End {
                actions.push(Action::Go(process));
                if state.crashes > 0 && *at != At::Begin {
                    actions.push(Action::Crash(process));
                }
            }
        }
        if state.edits > 0 {
            actions.push(Action::Edit);
        }
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        let mut next = state.clone();
        match action {
            Action::Go(process) => next.go(process),
            Action::Crash(process) => {
                next.crashes -= 1;
                next.processes[process].1 = At::Begin;
            }
            Action::Edit => {
                next.edits -= 1;
                next.registered.version += 1;
                next.registered.attributes.insert("FW".to_owned(), EDITED.to_owned());
            }
        }
        (next != *state).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("a device that is not held has its own attributes", |model: &Self, state: &State| {
                let firmware = if model.edits > state.edits { EDITED } else { ORIGINAL };
                !state.is_over()
                    || state.device.phase != Phase::Active
                    || (state.value("FW") == firmware && state.value("model") == ORIGINAL)
            }),
            Property::always("a device that is held is hidden", |_, state: &State| {
                let hidden = match state.device.phase {
                    Phase::Active => return true,
                    Phase::Parked => "moveOut",
                    Phase::Quarantined => "failedtoupdate",
                };
                let firmware = state.value("FW");
                !state.is_over() || (state.value("model") == hidden && (firmware == hidden || firmware == EDITED))
            }),
            Property::sometimes("it comes to an end", |_, state: &State| state.is_over()),
        ]
    }
}

fn check(failures: i64, works: &[Work], crashes: u8, edits: u8) {
    let checker = Recovery { failures, works: works.to_vec(), crashes, edits }.checker().spawn_bfs().join();
    println!("{works:?}: {} states", checker.unique_state_count());
    checker.assert_properties();
}

#[test]
fn a_parking_ends_in_every_way_at_every_moment() {
    check(1, &[Work::Follow, Work::Restore(1)], 2, 1);
    check(1, &[Work::Follow, Work::Succeed(5)], 2, 1);
    check(1, &[Work::Follow, Work::Release(5)], 2, 1);
    check(1, &[Work::Follow, Work::Restore(1), Work::Succeed(5)], 1, 1);
    check(1, &[Work::Follow, Work::Follow, Work::Restore(1)], 1, 1);
}

#[test]
fn a_quarantine_that_begins_while_the_parking_still_ends() {
    check(1, &[Work::Follow, Work::Restore(1), Work::Fail(2)], 1, 1);
    check(1, &[Work::Restore(1), Work::Fail(2), Work::Release(5)], 1, 1);
}
