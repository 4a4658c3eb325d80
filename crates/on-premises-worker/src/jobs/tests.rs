use super::*;
use serde_json::json;

const LEASE: Duration = Duration::from_secs(30);

/// Jobs, and a clock that stands still unless it is told.
struct Bench {
    jobs: Jobs,
    now: Instant,
}

fn seconds(number: u64) -> Duration {
    Duration::from_secs(number)
}

fn worker() -> WorkerName {
    "w".parse().unwrap()
}

fn lease(fence: u64) -> Lease {
    Lease { worker: worker(), fence }
}

fn value(number: u64) -> Answer {
    Answer::Value(json!(number).into())
}

fn stored(fence: u64) -> Stored {
    Stored::new(value(57), fence)
}

fn succeeded(fence: u64) -> WorkerMessage {
    message(&value(57), lease(fence))
}

/// The request of the only claim.
fn claim_of(actions: &[Action]) -> String {
    match actions {
        [Action::Send { message: WorkerMessage::Claim { request, .. }, .. }] => request.clone(),
        _ => panic!("no claim: {actions:?}"),
    }
}

fn claimed(actions: &[Action]) -> Vec<&str> {
    let claims = actions.iter().filter_map(|action| match action {
        Action::Send { handle, message: WorkerMessage::Claim { .. } } => Some(handle.as_str()),
        _ => None,
    });
    claims.collect()
}

fn heartbeat_of(actions: &[Action]) -> (Option<u8>, u64, String) {
    match actions {
        [Action::Send { message: WorkerMessage::Heartbeat { progress, lease: Some((lease, request)) }, .. }] => {
            (*progress, lease.fence, request.clone())
        }
        _ => panic!("no heartbeat: {actions:?}"),
    }
}

fn upload_of(actions: &[Action]) -> (u64, String) {
    match actions {
        [.., Action::Send { message: WorkerMessage::Upload { lease, request, .. }, .. }] => {
            (lease.fence, request.clone())
        }
        _ => panic!("no upload: {actions:?}"),
    }
}

fn put_of(actions: &[Action]) -> u64 {
    match actions {
        [Action::Put { number, .. }] => *number,
        _ => panic!("no put: {actions:?}"),
    }
}

/// What was recorded, and the number and message of the delivery that followed.
fn delivery_of(actions: &[Action]) -> (&Stored, u64, &WorkerMessage) {
    match actions {
        [Action::Record { stored, .. }, Action::Deliver { number, message, .. }] => (stored, *number, message),
        _ => panic!("no delivery: {actions:?}"),
    }
}

fn record(stored: Stored) -> Action {
    Action::Record { handle: "t".into(), stored }
}

fn grace_of(actions: &[Action]) -> Duration {
    match actions {
        [Action::Stop { grace, .. }] => *grace,
        _ => panic!("it is not stopped: {actions:?}"),
    }
}

fn starts(fence: u64) -> Vec<Action> {
    vec![Action::Start { handle: "t".into(), fence, input_url: None }]
}

fn stops(actions: &[Action]) -> bool {
    matches!(actions, [Action::Stop { handle, .. }] if handle == "t")
}

impl Bench {
    fn new(slots: usize) -> Self {
        let mut count = 0;
        let request = move || {
            count += 1;
            format!("r{count}")
        };
        let chance = Chance { request: Box::new(request), jitter: Box::new(|_| Duration::ZERO) };
        let mut bench = Self { jobs: Jobs::new(worker(), slots, chance), now: Instant::now() };
        assert_eq!(bench.on(Event::Online(true)), []);
        bench
    }

    /// A bench with one job that runs under fence 1.
    fn running() -> Self {
        let mut bench = Self::new(1);
        let request = claim_of(&bench.receive("t"));
        assert_eq!(bench.granted(&request, 1), starts(1));
        bench
    }

    fn on(&mut self, event: Event) -> Vec<Action> {
        self.jobs.handle(event, self.now)
    }

    fn after(&mut self, time: Duration) -> Vec<Action> {
        self.now += time;
        self.on(Event::Tick)
    }

    fn receive(&mut self, handle: &str) -> Vec<Action> {
        self.on(Event::Received { handle: handle.into(), needs_input: false, stored: None })
    }

    fn resume(&mut self, stored: Stored) -> Vec<Action> {
        self.on(Event::Received { handle: "t".into(), needs_input: false, stored: Some(stored) })
    }

    fn reply(&mut self, request: Option<&str>, verdict: Verdict) -> Vec<Action> {
        let request = request.map(str::to_owned);
        self.on(Event::Reply(WorkerReply { task_token: "t".into(), request, verdict }))
    }

    fn granted(&mut self, request: &str, fence: u64) -> Vec<Action> {
        let lease_milliseconds = u64::try_from(LEASE.as_millis()).unwrap();
        self.reply(Some(request), Verdict::Granted { fence, lease_milliseconds, input_url: None })
    }

    fn ended(&mut self, answer: Option<Answer>) -> Vec<Action> {
        self.on(Event::Ended { handle: "t".into(), answer })
    }

    fn delivered(&mut self, number: u64) -> Vec<Action> {
        self.on(Event::Delivered { handle: "t".into(), number })
    }

    fn put(&mut self, number: u64, result: Result<(), String>) -> Vec<Action> {
        self.on(Event::Put { handle: "t".into(), number, result })
    }

    fn upload(&mut self, request: &str) -> Vec<Action> {
        self.reply(Some(request), Verdict::Upload { url: "u".into(), headers: BTreeMap::new() })
    }
}

#[test]
fn a_job_is_claimed_run_and_answered() {
    let mut bench = Bench::running();
    let actions = bench.ended(Some(value(57)));
    let (recorded, number, message) = delivery_of(&actions);
    assert_eq!((recorded, message), (&stored(1), &succeeded(1)));
    assert_eq!(bench.receive("t"), [], "a duplicate");
    assert_eq!(bench.delivered(number), [record(Stored { delivered: true, ..stored(1) })]);
    assert!(!bench.jobs.knows("t"));
    assert_eq!(bench.jobs.wakes_at(), None);
}

#[test]
fn a_claim_is_repeated_unchanged_until_it_is_answered() {
    let mut bench = Bench::new(1);
    let request = claim_of(&bench.receive("t"));
    assert_eq!(bench.jobs.wakes_at(), Some(bench.now + PATIENCE));
    assert_eq!(bench.after(seconds(9)), []);
    assert_eq!(claim_of(&bench.after(seconds(1))), request);
    assert_eq!(claim_of(&bench.after(seconds(10))), request);
    assert_eq!(bench.granted(&request, 1)[..1], starts(1));
}

#[test]
fn a_job_whose_claims_nobody_answers_makes_way() {
    let mut bench = Bench::new(1);
    bench.receive("t");
    assert_eq!(bench.receive("other"), []);
    for _ in 1..UNANSWERED_CLAIMS {
        assert_eq!(claimed(&bench.after(PATIENCE)), ["t"]);
    }
    assert_eq!(claimed(&bench.after(PATIENCE)), ["other"]);
    for _ in 1..UNANSWERED_CLAIMS {
        assert_eq!(claimed(&bench.after(PATIENCE)), ["other"]);
    }
    assert_eq!(claimed(&bench.after(PATIENCE)), ["t"]);
}

#[test]
fn no_more_jobs_run_than_there_are_slots() {
    let mut bench = Bench::new(2);
    for handle in ["t", "u", "v", "w"] {
        bench.receive(handle);
    }
    assert_eq!(bench.jobs.open.values().filter(|job| job.has_slot()).count(), 2);
    // One is another worker's: the next has its turn, and then the first again.
    let request = bench.jobs.open["t"].claim.clone();
    let actions = bench.reply(Some(&request), Verdict::Held { retry_milliseconds: 5000 });
    assert_eq!(claimed(&actions), ["v"]);
    assert_eq!(bench.after(seconds(6)), [], "no slot is free");
}

#[test]
fn a_job_that_another_holds_is_claimed_later_with_a_new_request() {
    let mut bench = Bench::new(1);
    let first = claim_of(&bench.receive("t"));
    assert_eq!(bench.reply(Some(&first), Verdict::Held { retry_milliseconds: 5000 }), []);
    assert_eq!(bench.jobs.wakes_at(), Some(bench.now + seconds(5)));
    assert_eq!(bench.reply(Some("old"), Verdict::Held { retry_milliseconds: 1 }), [], "another request");
    assert_eq!(bench.after(seconds(4)), []);
    let second = claim_of(&bench.after(seconds(1)));
    assert_ne!(first, second);
    assert_eq!(bench.granted(&second, 2), starts(2));
    assert_eq!(bench.after(seconds(9)), [], "its lease is counted from the second request");
}

#[test]
fn a_job_that_is_over_is_forgotten() {
    let mut bench = Bench::new(1);
    let request = claim_of(&bench.receive("t"));
    assert_eq!(bench.reply(Some(&request), Verdict::Over), [Action::Forget { handle: "t".into() }]);
    let mut bench = Bench::running();
    assert!(stops(&bench.reply(None, Verdict::Over)));
    assert_eq!(bench.ended(None), [Action::Forget { handle: "t".into() }]);
    let mut bench = Bench::running();
    bench.ended(Some(value(57)));
    assert_eq!(bench.reply(None, Verdict::Over), [record(Stored { delivered: true, ..stored(1) })]);
    assert!(!bench.jobs.knows("t"));
}

#[test]
fn heartbeats_keep_the_lease_and_tell_the_progress() {
    let mut bench = Bench::running();
    bench.on(Event::Progress { handle: "t".into(), percent: 40 });
    let mut requests = Vec::new();
    for _ in 0..5 {
        let (progress, fence, request) = heartbeat_of(&bench.after(seconds(10)));
        assert_eq!((progress, fence), (Some(40), 1));
        assert_eq!(bench.granted(&request, 1), []);
        requests.push(request);
    }
    requests.sort();
    requests.dedup();
    assert_eq!(requests.len(), 5, "each has a request of its own");
}

#[test]
fn a_lease_ends_by_the_workers_own_clock() {
    let mut bench = Bench::running();
    heartbeat_of(&bench.after(seconds(10)));
    let (.., late) = heartbeat_of(&bench.after(seconds(10)));
    assert_eq!(bench.after(seconds(4)), []);
    // 25 s after the claim was sent, so that nothing is left of the program after 30.
    assert_eq!(grace_of(&bench.after(seconds(1))), seconds(5));
    // The renewal comes too late to save the run, and nothing begins before the program is gone.
    assert_eq!(bench.granted(&late, 1), []);
    assert_eq!(bench.after(seconds(1)), []);
    let request = claim_of(&bench.ended(None));
    assert_eq!(bench.granted(&request, 2), starts(2));
}

#[test]
fn a_renewal_counts_from_when_the_heartbeat_was_sent() {
    let mut bench = Bench::running();
    let (.., request) = heartbeat_of(&bench.after(seconds(10)));
    bench.after(seconds(14));
    bench.granted(&request, 1);
    bench.on(Event::Online(false));
    assert_eq!(bench.after(seconds(10)), []);
    assert!(stops(&bench.after(seconds(1))), "35 s after the beginning");
}

#[test]
fn a_program_has_time_to_end_but_not_beyond_its_lease() {
    // Soon after the lease has begun anew.
    assert_eq!(grace_of(&Bench::running().on(Event::Abort)), GRACE);
    assert_eq!(grace_of(&Bench::running().reply(None, Verdict::Over)), GRACE);
    // Two seconds before its end.
    let mut bench = Bench::running();
    bench.now += seconds(28);
    assert_eq!(grace_of(&bench.on(Event::Tick)), seconds(2));
    // On a machine that was suspended for longer.
    let mut bench = Bench::running();
    bench.now += seconds(3600);
    assert_eq!(grace_of(&bench.on(Event::Tick)), Duration::ZERO);
    // A short lease is not spent on the end.
    let mut bench = Bench::new(1);
    let request = claim_of(&bench.receive("t"));
    let verdict = Verdict::Granted { fence: 1, lease_milliseconds: 4000, input_url: None };
    assert_eq!(bench.reply(Some(&request), verdict), starts(1));
    bench.on(Event::Online(false));
    assert_eq!(bench.jobs.wakes_at(), Some(bench.now + seconds(3)));
    assert_eq!(grace_of(&bench.after(seconds(3))), seconds(1));
}

#[test]
fn the_lease_is_over_even_if_its_renewal_is_the_next_event() {
    let mut bench = Bench::running();
    let (.., request) = heartbeat_of(&bench.after(seconds(24)));
    bench.now += seconds(1);
    assert!(stops(&bench.granted(&request, 1)));
}

#[test]
fn a_grant_that_comes_late_has_what_is_left() {
    let mut bench = Bench::new(1);
    let request = claim_of(&bench.receive("t"));
    bench.after(seconds(11));
    bench.after(seconds(11));
    // Eight seconds are left: the heartbeat is due at once.
    let actions = bench.granted(&request, 1);
    assert_eq!(actions[..1], starts(1));
    heartbeat_of(&actions[1..]);
    assert!(stops(&bench.after(seconds(3))));
}

#[test]
fn a_grant_that_comes_too_late_is_not_used() {
    let mut bench = Bench::new(1);
    let first = claim_of(&bench.receive("t"));
    for _ in 0..3 {
        bench.after(PATIENCE);
    }
    assert_eq!(bench.granted(&first, 1), []);
    let second = claim_of(&bench.after(BREATH));
    assert_ne!(first, second);
    assert_eq!(bench.granted(&second, 2), starts(2));
}

#[test]
fn a_grant_of_an_earlier_process_is_not_used() {
    let mut bench = Bench::new(1);
    let request = claim_of(&bench.receive("t"));
    assert_eq!(bench.granted("of an earlier process", 4), []);
    assert_eq!(bench.granted(&request, 5), starts(5));
    assert_eq!(bench.reply(Some("of an earlier process"), Verdict::Over), [], "nor is the end of an earlier job");
    assert_eq!(bench.jobs.open["t"].fence(), Some(5));
}

#[test]
fn a_grant_without_the_address_of_the_input_is_not_used_unless_the_claim_has_it() {
    let mut bench = Bench::new(1);
    let event = Event::Received { handle: "t".into(), needs_input: true, stored: None };
    let request = claim_of(&bench.on(event));
    assert_eq!(bench.granted("unknown", 1), []);
    let input_url = Some("https://x".to_owned());
    let verdict = Verdict::Granted { fence: 1, lease_milliseconds: 30_000, input_url: input_url.clone() };
    let start = Action::Start { handle: "t".into(), fence: 1, input_url };
    assert_eq!(bench.reply(Some(&request), verdict), [start]);
    // The lease runs out, and then an old renewal is answered, which knows no address.
    let (.., old) = heartbeat_of(&bench.after(seconds(10)));
    bench.after(seconds(10));
    assert!(stops(&bench.after(seconds(5))));
    claim_of(&bench.ended(None));
    assert_eq!(bench.granted(&old, 1), []);
}

#[test]
fn an_old_claim_that_comes_to_the_cloud_late_does_not_end_the_run() {
    let mut bench = Bench::new(1);
    let first = claim_of(&bench.receive("t"));
    for _ in 0..3 {
        bench.after(PATIENCE);
    }
    assert_eq!(bench.granted(&first, 1), [], "too late");
    let second = claim_of(&bench.after(BREATH));
    assert_eq!(bench.granted(&second, 2), starts(2));
    assert_eq!(bench.granted(&first, 3), []);
    assert_eq!(bench.jobs.open["t"].fence(), Some(3));
}

#[test]
fn a_lower_fence_counts_for_nothing_and_a_higher_one_is_taken() {
    let mut bench = Bench::new(1);
    let request = claim_of(&bench.receive("t"));
    bench.granted(&request, 5);
    bench.after(seconds(1));
    let (.., renewal) = heartbeat_of(&bench.after(seconds(10)));
    assert_eq!(bench.granted(&renewal, 4), []);
    assert_eq!(bench.jobs.open["t"].fence(), Some(5));
    bench.granted(&renewal, 6);
    let actions = bench.ended(Some(value(57)));
    assert_eq!(delivery_of(&actions).2, &succeeded(6));
}

#[test]
fn a_lost_lease_stops_the_program_and_the_job_is_claimed_again() {
    let mut bench = Bench::running();
    let (.., old) = heartbeat_of(&bench.after(seconds(10)));
    let (.., request) = heartbeat_of(&bench.after(seconds(10)));
    assert!(stops(&bench.reply(Some(&request), Verdict::Lost)));
    let claim = claim_of(&bench.ended(None));
    assert_eq!(bench.granted(&old, 1), [], "a late renewal of what is lost");
    assert_eq!(bench.granted(&claim, 3), starts(3));
    assert_eq!(bench.reply(Some(&old), Verdict::Lost), [], "the old lease, not this one");
    assert_eq!(bench.reply(Some("unknown"), Verdict::Lost), []);
    assert_eq!(bench.reply(None, Verdict::Lost), []);
}

#[test]
fn a_result_that_comes_with_the_end_of_its_lease_is_not_thrown_away() {
    let mut bench = Bench::running();
    bench.on(Event::Online(false));
    assert!(stops(&bench.after(LEASE)));
    bench.on(Event::Online(true));
    let actions = bench.ended(Some(value(57)));
    assert_eq!(actions[0], record(stored(1)));
    let request = claim_of(&actions[1..]);
    let actions = bench.granted(&request, 2);
    assert_eq!(delivery_of(&actions).2, &succeeded(2));
}

#[test]
fn an_answer_that_is_not_taken_is_given_again_without_a_second_run() {
    let mut bench = Bench::running();
    let actions = bench.ended(Some(value(57)));
    let (_, first, _) = delivery_of(&actions);
    // Before the broker's acknowledgement, and after a restart of the cloud's side.
    let claim = claim_of(&bench.reply(None, Verdict::Lost));
    assert_eq!(bench.delivered(first), []);
    assert_eq!(bench.reply(Some(&claim), Verdict::Held { retry_milliseconds: 1000 }), []);
    let claim = claim_of(&bench.after(seconds(1)));
    assert_eq!(claim_of(&bench.after(PATIENCE)), claim, "it is repeated too");
    let actions = bench.granted(&claim, 2);
    let (recorded, second, message) = delivery_of(&actions);
    assert_eq!((recorded, message), (&stored(2), &succeeded(2)));
    bench.delivered(second);
    // After it.
    let event = Event::Disowned { handle: "t".into(), stored: stored(2) };
    let claim = claim_of(&bench.on(event));
    let actions = bench.granted(&claim, 3);
    assert_eq!(delivery_of(&actions).2, &succeeded(3));
}

#[test]
fn a_job_that_came_with_its_answer_is_answered_again() {
    let mut bench = Bench::new(1);
    let actions = bench.resume(Stored { delivered: true, ..stored(2) });
    assert!(matches!(&actions[..], [Action::Deliver { message, .. }] if *message == succeeded(2)), "{actions:?}");
}

#[test]
fn after_a_restart_open_jobs_are_claimed_and_answers_sent() {
    let mut bench = Bench::new(4);
    bench.on(Event::Online(false));
    assert_eq!(bench.receive("open"), []);
    let actions = bench.resume(stored(2));
    assert!(matches!(&actions[..], [Action::Deliver { .. }]), "the connection keeps it until it is there");
    assert_eq!(bench.jobs.wakes_at(), None, "there is nothing to do without a connection");
    assert_eq!(claimed(&bench.on(Event::Online(true))), ["open"]);
}

#[test]
fn nothing_piles_up_without_a_connection() {
    let mut bench = Bench::running();
    bench.receive("other");
    bench.on(Event::Online(false));
    for _ in 0..2 {
        assert_eq!(bench.after(seconds(10)), []);
        assert!(bench.jobs.wakes_at() > Some(bench.now));
    }
    heartbeat_of(&bench.on(Event::Online(true)));
}

#[test]
fn a_large_result_is_uploaded_before_it_is_answered() {
    let mut bench = Bench::running();
    let large = Answer::Large { bytes: 1 << 20 };
    let actions = bench.ended(Some(large.clone()));
    let kept = Stored::new(large.clone(), 1);
    assert_eq!(actions[0], record(kept.clone()));
    let (fence, request) = upload_of(&actions);
    assert_eq!(fence, 1);
    // The heartbeats go on, the question is repeated.
    let actions = bench.after(seconds(10));
    assert_eq!(actions.len(), 2, "{actions:?}");
    assert_eq!(bench.upload("another"), []);
    let number = put_of(&bench.upload(&request));
    assert_eq!(bench.upload(&request), [], "said twice");
    heartbeat_of(&bench.after(seconds(10)));
    // It fails once, and a fresh address is asked for.
    assert_eq!(bench.put(number, Err("busy".into())), []);
    let (_, again) = upload_of(&bench.after(seconds(1)));
    assert_ne!(again, request);
    let number = put_of(&bench.upload(&again));
    let actions = bench.put(number, Ok(()));
    let (recorded, number, message) = delivery_of(&actions);
    assert_eq!(recorded, &Stored { uploaded: true, ..kept });
    assert_eq!(message, &super::message(&large, lease(1)));
    bench.delivered(number);
    assert!(!bench.jobs.knows("t"));
}

#[test]
fn a_large_result_whose_lease_is_lost_is_uploaded_under_the_next() {
    let mut bench = Bench::running();
    let (_, request) = upload_of(&bench.ended(Some(Answer::Large { bytes: 9 })));
    let claim = claim_of(&bench.reply(Some(&request), Verdict::Lost));
    let (fence, request) = upload_of(&bench.granted(&claim, 2));
    assert_eq!(fence, 2);
    let number = put_of(&bench.upload(&request));
    let actions = bench.put(number, Ok(()));
    let (recorded, ..) = delivery_of(&actions);
    // What was uploaded under one lease is nothing under another.
    let claim = claim_of(&bench.on(Event::Reply(WorkerReply {
        task_token: "t".into(),
        request: None,
        verdict: Verdict::Lost,
    })));
    assert!(recorded.uploaded);
    assert_eq!(upload_of(&bench.granted(&claim, 3)).0, 3);
}

#[test]
fn a_result_that_is_too_large_is_a_failure_that_says_so() {
    let mut bench = Bench::running();
    let (_, request) = upload_of(&bench.ended(Some(Answer::Large { bytes: 900 })));
    let actions = bench.reply(Some(&request), Verdict::TooLarge { limit: 800 });
    let cause = Some("the result has 900 bytes, at most 800 are taken".to_owned());
    let failed = WorkerMessage::Failed { exception: "ResultTooLarge".into(), cause, lease: Some(lease(1)) };
    assert_eq!(delivery_of(&actions).2, &failed);
}

#[test]
fn an_upload_that_never_works_is_a_failure() {
    let mut bench = Bench::running();
    let (_, mut request) = upload_of(&bench.ended(Some(Answer::Large { bytes: 900 })));
    for _ in 1..UPLOAD_ATTEMPTS {
        let number = put_of(&bench.upload(&request));
        bench.put(number, Err("busy".into()));
        let actions = bench.after(LONGEST_UPLOAD_PAUSE);
        let asked = actions.iter().find_map(|action| match action {
            Action::Send { message: WorkerMessage::Upload { request, .. }, .. } => Some(request.clone()),
            _ => None,
        });
        request = asked.expect("a question");
    }
    let number = put_of(&bench.upload(&request));
    let actions = bench.put(number, Err("busy".into()));
    let (recorded, ..) = delivery_of(&actions);
    assert!(matches!(&recorded.answer, Answer::Failed { exception, .. } if exception == "UploadFailed"));
}

#[test]
fn a_drain_lets_running_jobs_end_and_begins_none() {
    let mut bench = Bench::running();
    bench.receive("waiting");
    assert_eq!(bench.on(Event::Drain), []);
    assert!(!bench.jobs.is_drained());
    heartbeat_of(&bench.after(seconds(10)));
    let actions = bench.ended(Some(value(57)));
    let (_, number, _) = delivery_of(&actions);
    assert!(!bench.jobs.is_drained(), "the answer is not sent");
    bench.delivered(number);
    assert!(bench.jobs.is_drained());
    assert_eq!(bench.jobs.wakes_at(), None);
}

#[test]
fn a_lease_that_comes_in_a_drain_is_given_back() {
    let mut bench = Bench::new(1);
    let request = claim_of(&bench.receive("t"));
    bench.on(Event::Drain);
    let release = Action::Send { handle: "t".into(), message: WorkerMessage::Release(lease(1)) };
    assert_eq!(bench.granted(&request, 1), [release]);
    assert!(bench.jobs.is_drained());
    // One that never comes is not waited for.
    let mut bench = Bench::new(1);
    bench.receive("t");
    bench.on(Event::Drain);
    assert!(!bench.jobs.is_drained());
    assert_eq!(bench.jobs.wakes_at(), Some(bench.now + DRAIN_PATIENCE));
    bench.after(DRAIN_PATIENCE);
    assert!(bench.jobs.is_drained());
}

#[test]
fn an_abort_stops_what_runs_and_gives_it_back() {
    let mut bench = Bench::running();
    bench.on(Event::Drain);
    assert!(stops(&bench.on(Event::Abort)));
    assert!(!bench.jobs.is_drained());
    let release = Action::Send { handle: "t".into(), message: WorkerMessage::Release(lease(1)) };
    assert_eq!(bench.ended(None), [release]);
    assert!(bench.jobs.is_drained());
    // An answer that nobody takes does not keep the worker.
    let mut bench = Bench::running();
    bench.on(Event::Drain);
    bench.ended(Some(value(57)));
    assert!(!bench.jobs.is_drained());
    bench.on(Event::Abort);
    assert!(bench.jobs.is_drained());
}

#[test]
fn a_lease_that_was_given_back_does_not_count_when_its_grant_comes_again() {
    let mut bench = Bench::new(1);
    let first = claim_of(&bench.receive("t"));
    bench.receive("other");
    for _ in 0..2 {
        bench.after(seconds(1));
    }
    bench.reply(Some(&first), Verdict::Held { retry_milliseconds: 20_000 });
    // A repeated claim was granted after all, but the slot is another's now.
    let release = Action::Send { handle: "t".into(), message: WorkerMessage::Release(lease(1)) };
    assert_eq!(bench.granted(&first, 1), [release]);
    let over = WorkerReply { task_token: "other".into(), request: None, verdict: Verdict::Over };
    bench.on(Event::Reply(over));
    assert_eq!(bench.granted(&first, 1), [], "a duplicate");
}

#[test]
fn at_most_one_of_two_workers_runs_a_job_whatever_gets_late() {
    // Two workers and a cloud that gives leases as it does; every message takes from 0 to 40 s, none comes in order.
    let mut runs = 0;
    for seed in 0..300_u64 {
        let mut random = Random(seed * 7 + 1);
        let (mut benches, start) = ([Bench::new(1), Bench::new(1)], Instant::now());
        let (mut cloud, mut holders) = (Cloud::default(), [false; 2]);
        let mut post: Vec<(Instant, usize, Mail)> = Vec::new();
        for (index, bench) in benches.iter_mut().enumerate() {
            bench.now = start;
            let actions = bench.receive("t");
            send(actions, index, bench, &mut post, &mut random, &mut holders);
        }
        for step in 0..600 {
            let now = start + Duration::from_millis(500 * step);
            post.sort_by_key(|(at, ..)| *at);
            while post.first().is_some_and(|(at, ..)| *at <= now) {
                let (_, index, mail) = post.remove(0);
                match mail {
                    Mail::ToCloud(message) => {
                        if let Some(reply) = cloud.hear(index, message, now) {
                            post.push((now + random.delay(), index, Mail::ToWorker(reply)));
                        }
                    }
                    Mail::ToWorker(_) | Mail::Ended => {
                        benches[index].now = now;
                        let actions = if let Mail::ToWorker(reply) = mail {
                            benches[index].on(Event::Reply(reply))
                        } else {
                            holders[index] = false;
                            benches[index].ended(None)
                        };
                        send(actions, index, &mut benches[index], &mut post, &mut random, &mut holders);
                    }
                }
                post.sort_by_key(|(at, ..)| *at);
            }
            for (index, bench) in benches.iter_mut().enumerate() {
                bench.now = now;
                let actions = bench.on(Event::Tick);
                send(actions, index, bench, &mut post, &mut random, &mut holders);
            }
            assert!(!(holders[0] && holders[1]), "seed {seed}, step {step}");
        }
        runs += cloud.fence;
    }
    assert!(runs > 600, "it is no proof if nothing goes wrong: {runs}");
}

enum Mail {
    ToCloud(WorkerMessage),
    ToWorker(WorkerReply),
    /// A program that was stopped is gone.
    Ended,
}

struct Random(u64);

impl Random {
    fn next(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % below
    }

    /// Mostly short, sometimes longer than a lease.
    fn delay(&mut self) -> Duration {
        let most = if self.next(4) == 0 { 40_000 } else { 1000 };
        Duration::from_millis(self.next(most))
    }
}

#[derive(Default)]
struct Cloud {
    fence: u64,
    holder: Option<(usize, String, Instant)>,
}

impl Cloud {
    fn hear(&mut self, index: usize, message: WorkerMessage, now: Instant) -> Option<WorkerReply> {
        let granted = |fence| {
            let lease_milliseconds = u64::try_from(LEASE.as_millis()).unwrap();
            Verdict::Granted { fence, lease_milliseconds, input_url: None }
        };
        let (request, verdict) = match message {
            WorkerMessage::Claim { request, .. } => {
                let verdict = match &mut self.holder {
                    Some((holder, of, until)) if *holder == index && *of == request => {
                        *until = now + LEASE;
                        granted(self.fence)
                    }
                    Some((holder, _, until)) if *holder != index && *until > now => {
                        Verdict::Held { retry_milliseconds: u64::try_from((*until - now).as_millis()).unwrap() }
                    }
                    _ => {
                        self.fence += 1;
                        self.holder = Some((index, request.clone(), now + LEASE));
                        granted(self.fence)
                    }
                };
                (request, verdict)
            }
            WorkerMessage::Heartbeat { lease: Some((lease, request)), .. } => {
                let verdict = match &mut self.holder {
                    Some((holder, _, until)) if *holder == index && lease.fence == self.fence => {
                        *until = (*until).max(now + LEASE);
                        granted(self.fence)
                    }
                    _ => Verdict::Lost,
                };
                (request, verdict)
            }
            WorkerMessage::Release(lease) => {
                if lease.fence == self.fence {
                    self.holder = None;
                }
                return None;
            }
            _ => return None,
        };
        Some(WorkerReply { task_token: "t".into(), request: Some(request), verdict })
    }
}

/// Sends what a worker says; a program that is stopped takes all the time that it has.
fn send(
    actions: Vec<Action>,
    index: usize,
    bench: &mut Bench,
    post: &mut Vec<(Instant, usize, Mail)>,
    random: &mut Random,
    running: &mut [bool; 2],
) {
    for action in actions {
        match action {
            Action::Send { message, .. } => post.push((bench.now + random.delay(), index, Mail::ToCloud(message))),
            Action::Start { .. } => running[index] = true,
            Action::Stop { grace, .. } => post.push((bench.now + grace, index, Mail::Ended)),
            other => panic!("{other:?}"),
        }
    }
}
