//! Things, keys, certificates and policies of simulated devices: making them in the registry and removing them.

use crate::device::Identity;
use aws_sdk_iot::Client;
use aws_sdk_iot::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_iot::types::{AttributePayload, CertificateStatus, Tag, ThingGroupProperties};
use mqtt_connection::with_causes;
use protocol::fields::{ATTRIBUTE_NAME, ATTRIBUTE_VALUE, Field};
use protocol::recovery::UPDATE_REPORTS_TOPIC;
use protocol::{ProtocolName, ThingName};
use rcgen::{CertificateParams, DnType, KeyPair};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::OpenOptions;
use std::future::Future;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OnceCell, Semaphore};
use tokio::task::JoinSet;

/// How many devices are made or removed at the same time; the registry's limits are about as high.
const CONCURRENCY: usize = 16;
/// Marks what was made here, so that `cleanup` removes nothing else.
const CREATED_BY: (&str, &str) = ("createdBy", "device-simulator");
/// How often a thing or certificate is tried to be removed: detaching takes the registry a moment.
const REMOVALS: u32 = 6;

/// The attribute that links a thing to its user's settings.
const EXTERNAL_ID: &str = "externalId";
/// The attributes that are set from here alone.
const OWN_ATTRIBUTES: [&str; 4] = ["protocol", "firmwareVersion", EXTERNAL_ID, CREATED_BY.0];

const ALREADY_EXISTS: &str = "ResourceAlreadyExistsException";
const CERTIFICATE_STATE: &str = "CertificateStateException";
const DELETE_CONFLICT: &str = "DeleteConflictException";
const INVALID_REQUEST: &str = "InvalidRequestException";
const NOT_FOUND: &str = "ResourceNotFoundException";

/// Provisioning or cleaning up did not work.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct ProvisionError(String);

impl ProvisionError {
    fn new(what: impl std::fmt::Display, why: impl std::fmt::Display) -> Self {
        Self(format!("{what}: {why}"))
    }

    fn file(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.display().to_string();
        move |error| Self::new(format!("{path} cannot be written"), error)
    }
}

/// A failed call in one sentence: what was tried, and what the service said.
fn failed<E, R>(what: impl std::fmt::Display) -> impl FnOnce(SdkError<E, R>) -> ProvisionError
where
    E: std::error::Error + 'static,
    R: std::fmt::Debug + 'static,
{
    move |error| ProvisionError::new(what, with_causes(&error))
}

fn has_code<E: ProvideErrorMetadata, R>(error: &SdkError<E, R>, code: &str) -> bool {
    error.code() == Some(code)
}

/// Which protocols the devices of a fleet speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProtocolMix {
    /// All the same.
    All(ProtocolName),
    /// By turns, JSON first.
    Mixed,
}

impl ProtocolMix {
    fn of(self, index: usize) -> ProtocolName {
        match self {
            Self::All(protocol) => protocol,
            Self::Mixed => ProtocolName::ALL[index % ProtocolName::ALL.len()],
        }
    }
}

impl std::str::FromStr for ProtocolMix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "mixed" {
            return Ok(Self::Mixed);
        }
        text.parse().map(Self::All).map_err(|_| format!("{text:?} is no protocol: expected json, usp or mixed"))
    }
}

/// What to make.
#[derive(Debug, Clone)]
pub struct ProvisionOptions {
    /// The devices' names; [`numbered`] makes them.
    pub things: Vec<ThingName>,
    /// Their protocols.
    pub protocols: ProtocolMix,
    /// The version that they leave the factory with.
    pub firmware_version: String,
    /// The folder to which each device's folder is added.
    pub certificates: PathBuf,
    /// What the attribute `externalId` of each becomes, by which a third party knows its user; `{thing}` stands for
    /// the thing's name. None: they get no such attribute.
    pub external_id: Option<String>,
    /// Whether they get an attribute `protocol`; without it the cloud learns how a device speaks from its first boot.
    pub protocol_attribute: bool,
    /// Further attributes of each, those that exist included; [`attribute`] reads them. One without a value is taken
    /// away.
    pub attributes: BTreeMap<String, String>,
    /// The policy for their certificates.
    pub policy: DevicePolicy,
    /// The thing group that they join, made if it is missing.
    pub thing_group: Option<String>,
    /// Their thing type, which must exist. Without one a thing can have three attributes, and these devices have them
    /// (<https://docs.aws.amazon.com/iot/latest/developerguide/thing-types.html>).
    pub thing_type: Option<String>,
}

/// The policy that devices connect under.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DevicePolicy {
    /// One that exists.
    Existing(String),
    /// One of that name, made if it is missing: each thing may use its own topics and nothing else.
    Own(String),
}

impl DevicePolicy {
    fn name(&self) -> &str {
        match self {
            Self::Existing(name) | Self::Own(name) => name,
        }
    }
}

/// Reads `NAME=VALUE`, an attribute that a thing may have.
pub fn attribute(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or_else(|| format!("{text:?}: expected NAME=VALUE"))?;
    if OWN_ATTRIBUTES.contains(&name) {
        return Err(format!("{name} is set by the simulator itself"));
    }
    checked(&ATTRIBUTE_NAME, name)?;
    checked(&ATTRIBUTE_VALUE, value)?;
    Ok((name.to_owned(), value.to_owned()))
}

fn checked(field: &Field, text: &str) -> Result<(), String> {
    field.check(text).map_err(|error| format!("{text:?} is no {}: {error}", field.name))
}

/// What the things get as attributes beside the further ones, which [`attribute`] has checked.
fn check_own_attributes(options: &ProvisionOptions) -> Result<(), ProvisionError> {
    let unfit = |name: &str| {
        let what = format!("no thing is registered: {name}");
        move |error: String| ProvisionError::new(what, error)
    };
    checked(&ATTRIBUTE_VALUE, &options.firmware_version).map_err(unfit("firmwareVersion"))?;
    let mut external_ids =
        options.external_id.iter().flat_map(|template| options.things.iter().map(|thing| external_id(template, thing)));
    external_ids.try_for_each(|id| checked(&ATTRIBUTE_VALUE, &id)).map_err(unfit("externalId"))
}

fn external_id(template: &str, thing: &ThingName) -> String {
    template.replace("{thing}", thing.as_str())
}

/// The names `{prefix}-0001` and so on.
pub fn numbered(prefix: &str, count: usize) -> Result<Vec<ThingName>, protocol::InvalidId> {
    (1..=count).map(|number| format!("{prefix}-{number:04}").parse()).collect()
}

/// How many devices were made, and how many were there already.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Provisioned {
    /// With a new certificate.
    pub created: usize,
    /// With the certificate that they had.
    pub kept: usize,
}

/// Makes devices; what exists is kept but for the further attributes, so it can be called again after it was
/// interrupted. `on_device` is called for each one that is ready.
pub async fn provision(
    client: &Client,
    options: ProvisionOptions,
    on_device: impl Fn(&ThingName),
) -> Result<Provisioned, ProvisionError> {
    check_own_attributes(&options)?;
    if let Some(group) = &options.thing_group {
        create_group(client, group).await?;
    }
    let work = Arc::new(Provisioning { client: client.clone(), options, policy: OnceCell::new() });
    let jobs = (0..work.options.things.len()).map(|index| {
        let work = Arc::clone(&work);
        async move { work.device(index).await.map(|is_new| (index, is_new)) }
    });
    let mut result = Provisioned::default();
    bounded(jobs, |(index, is_new)| {
        *(if is_new { &mut result.created } else { &mut result.kept }) += 1;
        on_device(&work.options.things[index]);
    })
    .await?;
    Ok(result)
}

/// Runs all jobs, a few at a time; stops at the first that fails.
async fn bounded<T: Send + 'static>(
    jobs: impl Iterator<Item = impl Future<Output = Result<T, ProvisionError>> + Send + 'static>,
    mut on_result: impl FnMut(T),
) -> Result<(), ProvisionError> {
    let permits = Arc::new(Semaphore::new(CONCURRENCY));
    let mut tasks = JoinSet::new();
    for job in jobs {
        let permits = Arc::clone(&permits);
        tasks.spawn(async move {
            // The semaphore is never closed.
            let _permit = permits.acquire().await.ok();
            job.await
        });
    }
    while let Some(result) = tasks.join_next().await {
        on_result(result.map_err(|error| ProvisionError::new("a task ended early", error))??);
    }
    Ok(())
}

struct Provisioning {
    client: Client,
    options: ProvisionOptions,
    policy: OnceCell<()>,
}

impl Provisioning {
    /// True if the device got a certificate.
    async fn device(&self, index: usize) -> Result<bool, ProvisionError> {
        let options = &self.options;
        let thing = &options.things[index];
        let folder = options.certificates.join(thing.as_str());
        let known = Identity::read(&folder).ok();
        let identity = with_attributes(
            known.clone().unwrap_or_else(|| Identity {
                thing: thing.clone(),
                protocol: options.protocols.of(index),
                firmware_version: options.firmware_version.clone(),
                certificate_id: None,
                attributes: BTreeMap::new(),
            }),
            &options.attributes,
        );
        let arn_prefix = self.create_thing(&identity).await?;
        if known.is_some_and(|known| known.attributes != identity.attributes) {
            write_identity(&folder, &identity)?;
        }
        self.policy.get_or_try_init(|| self.ensure_policy(&arn_prefix)).await?;
        let (principal, is_new) = match self.registered_certificate(&folder, &identity).await? {
            Some(principal) => (principal, false),
            None => (self.create_certificate(&folder, identity).await?, true),
        };
        self.attach(thing, &principal).await?;
        Ok(is_new)
    }

    /// Returns what the ARNs of this account and Region begin with.
    async fn create_thing(&self, identity: &Identity) -> Result<String, ProvisionError> {
        let mut further = identity.attributes.clone();
        let external_id = self.options.external_id.as_ref().map(|template| external_id(template, &identity.thing));
        further.extend(external_id.map(|id| (EXTERNAL_ID.to_owned(), id)));
        let mut attributes = AttributePayload::builder().attributes("firmwareVersion", &identity.firmware_version);
        if self.options.protocol_attribute {
            attributes = attributes.attributes("protocol", identity.protocol.to_string());
        }
        let attributes = further.iter().fold(attributes, |all, (name, value)| all.attributes(name, value));
        let name = identity.thing.as_str();
        let create = self.client.create_thing().thing_name(name).attribute_payload(attributes.build());
        let created = create.set_thing_type_name(self.options.thing_type.clone()).send().await;
        let arn = match created {
            Ok(created) => created.thing_arn,
            // It has been upgraded since, so its attributes are others.
            Err(error) if has_code(&error, ALREADY_EXISTS) => self.keep_thing(name, further).await?,
            Err(error) => return Err(failed(format!("the thing {name} cannot be created"))(error)),
        };
        let arn = arn.unwrap_or_default();
        arn.strip_suffix(&format!(":thing/{name}"))
            .map(str::to_owned)
            .ok_or_else(|| ProvisionError::new(format!("the thing {name} has an unexpected ARN"), arn))
    }

    /// Leaves an existing thing as it is, but for attributes that it lacks or that are asked for now. Returns its ARN.
    async fn keep_thing(
        &self,
        name: &str,
        further: BTreeMap<String, String>,
    ) -> Result<Option<String>, ProvisionError> {
        let existing = self.client.describe_thing().thing_name(name).send().await;
        let existing = existing.map_err(failed(format!("the thing {name} cannot be read")))?;
        let known = existing.attributes.unwrap_or_default();
        let further = changes(&known, further, &self.options.attributes);
        if !further.is_empty() {
            let what = format!("the thing {name} does not get its attributes {further:?}");
            let attributes = AttributePayload::builder().set_attributes(Some(further.into_iter().collect()));
            let update = self.client.update_thing().thing_name(name).attribute_payload(attributes.merge(true).build());
            update.send().await.map_err(failed(what))?;
        }
        Ok(existing.thing_arn)
    }

    async fn ensure_policy(&self, arn_prefix: &str) -> Result<(), ProvisionError> {
        let DevicePolicy::Own(name) = &self.options.policy else { return Ok(()) };
        let created = self
            .client
            .create_policy()
            .policy_name(name)
            .policy_document(policy_document(arn_prefix))
            .tags(created_by()?)
            .send()
            .await;
        match created {
            Err(error) if !has_code(&error, ALREADY_EXISTS) => {
                Err(failed(format!("the policy {name} cannot be created"))(error))
            }
            _ => Ok(()),
        }
    }

    /// The ARN of the certificate in the folder, if the registry knows it. A certificate that was not made here
    /// has no id in the folder and is taken to be registered and attached.
    async fn registered_certificate(
        &self,
        folder: &Path,
        identity: &Identity,
    ) -> Result<Option<String>, ProvisionError> {
        if !folder.join("certificate.pem").exists() || !folder.join("private.key").exists() {
            return Ok(None);
        }
        let Some(id) = &identity.certificate_id else { return Ok(None) };
        match self.client.describe_certificate().certificate_id(id).send().await {
            Ok(found) => Ok(found.certificate_description.and_then(|found| found.certificate_arn)),
            Err(error) if has_code(&error, NOT_FOUND) => Ok(None),
            Err(error) => Err(failed(format!("the certificate {id} cannot be read"))(error)),
        }
    }

    /// Makes a key that never leaves this machine, has it certified, and writes the device's folder.
    async fn create_certificate(&self, folder: &Path, identity: Identity) -> Result<String, ProvisionError> {
        let thing = &identity.thing;
        let key_file = folder.join("private.key");
        std::fs::create_dir_all(folder).map_err(ProvisionError::file(folder))?;
        let (key, request) = signing_request(thing, &key_file)?;
        let answer = self.client.create_certificate_from_csr().certificate_signing_request(request).set_as_active(true);
        let answer = answer.send().await.map_err(failed(format!("{thing} gets no certificate")))?;
        let (Some(arn), Some(id), Some(pem)) = (answer.certificate_arn, answer.certificate_id, answer.certificate_pem)
        else {
            return Err(ProvisionError(format!("the service answered {thing} without a certificate")));
        };
        write_file(&key_file, key.as_bytes(), 0o600)?;
        write_file(&folder.join("certificate.pem"), pem.as_bytes(), 0o644)?;
        // Last: the folder counts as a device from here on.
        write_identity(folder, &Identity { certificate_id: Some(id), ..identity })?;
        Ok(arn)
    }

    async fn attach(&self, thing: &ThingName, principal: &str) -> Result<(), ProvisionError> {
        let attach = self.client.attach_thing_principal().thing_name(thing.as_str()).principal(principal);
        attach.send().await.map_err(failed(format!("{thing} and its certificate cannot be attached")))?;
        let policy = self.options.policy.name();
        let attach = self.client.attach_policy().policy_name(policy).target(principal);
        attach
            .send()
            .await
            .map_err(failed(format!("the policy {policy} cannot be attached to {thing}'s certificate")))?;
        if let Some(group) = &self.options.thing_group {
            let add = self.client.add_thing_to_thing_group().thing_group_name(group).thing_name(thing.as_str());
            add.send().await.map_err(failed(format!("{thing} cannot join the group {group}")))?;
        }
        Ok(())
    }
}

/// The identity with attributes that are asked for; one without a value is taken away.
fn with_attributes(mut identity: Identity, asked: &BTreeMap<String, String>) -> Identity {
    identity.attributes.extend(asked.clone());
    identity.attributes.retain(|_, value| !value.is_empty());
    identity
}

/// What an existing thing's attributes change to: those that are asked for become so, of the others only what is
/// missing is added, because the cloud may have changed them since. The registry takes an empty value for a removal.
fn changes(
    known: &HashMap<String, String>,
    further: BTreeMap<String, String>,
    asked: &BTreeMap<String, String>,
) -> BTreeMap<String, String> {
    let mut changes = further;
    changes.retain(|name, _| !known.contains_key(name));
    changes.extend(asked.clone());
    changes.retain(|name, value| known.get(name).map_or("", String::as_str) != value);
    changes
}

fn write_identity(folder: &Path, identity: &Identity) -> Result<(), ProvisionError> {
    let json = serde_json::to_vec_pretty(identity).map_err(|error| ProvisionError::new("device.json", error))?;
    write_file(&folder.join(Identity::FILE), &json, 0o644)
}

/// The device's key, kept if there is one, and a certificate signing request for it.
fn signing_request(thing: &ThingName, key_file: &Path) -> Result<(String, String), ProvisionError> {
    let wrong = |error: rcgen::Error| ProvisionError::new(format!("no key and signing request for {thing}"), error);
    let key = match std::fs::read_to_string(key_file) {
        Ok(pem) => KeyPair::from_pem(&pem).map_err(wrong)?,
        // The default is P-256.
        Err(_) => KeyPair::generate().map_err(wrong)?,
    };
    let mut params = CertificateParams::default();
    // An X.509 common name has at most 64 characters (RFC 5280), a thing's name 128.
    params.distinguished_name.push(DnType::CommonName, thing.as_str().chars().take(64).collect::<String>());
    let request = params.serialize_request(&key).and_then(|request| request.pem()).map_err(wrong)?;
    Ok((key.serialize_pem(), request))
}

fn write_file(path: &Path, bytes: &[u8], mode: u32) -> Result<(), ProvisionError> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(mode);
    options.open(path).and_then(|mut file| file.write_all(bytes)).map_err(ProvisionError::file(path))
}

fn created_by() -> Result<Tag, ProvisionError> {
    let (key, value) = CREATED_BY;
    Tag::builder().key(key).value(value).build().map_err(|error| ProvisionError::new("the tag", error))
}

async fn create_group(client: &Client, group: &str) -> Result<(), ProvisionError> {
    let (key, value) = CREATED_BY;
    let attributes = AttributePayload::builder().attributes(key, value).build();
    let properties = ThingGroupProperties::builder().attribute_payload(attributes).build();
    match client.create_thing_group().thing_group_name(group).thing_group_properties(properties).send().await {
        Err(error) if !has_code(&error, ALREADY_EXISTS) => {
            Err(failed(format!("the thing group {group} cannot be created"))(error))
        }
        _ => Ok(()),
    }
}

/// What one device may do: connect as its own thing, receive its commands, answer them, report on its updates.
fn policy_document(arn_prefix: &str) -> String {
    const THING: &str = "${iot:Connection.Thing.ThingName}";
    let arn = |kind: &str, name: &str| format!("{arn_prefix}:{kind}/{}", name.replace("{thing}", THING));
    let requests = ["devices/{thing}/firmware_req", "devices/{thing}/config_req", "agents/{thing}/usp/request/*"];
    let responses = [
        "devices/{thing}/firmware_resp",
        "devices/{thing}/config_resp",
        "controllers/self::aws-dm-controller/agents/{thing}/*",
    ];
    let all = |kind: &str, topics: &[&str]| topics.iter().map(|topic| arn(kind, topic)).collect::<Vec<_>>();
    json!({
        "Version": "2012-10-17",
        "Statement": [
            {
                "Effect": "Allow",
                "Action": "iot:Connect",
                "Resource": arn("client", "{thing}"),
                "Condition": {"Bool": {"iot:Connection.Thing.IsAttached": "true"}}
            },
            {"Effect": "Allow", "Action": "iot:Subscribe", "Resource": all("topicfilter", &requests)},
            {"Effect": "Allow", "Action": "iot:Receive", "Resource": all("topic", &requests)},
            {"Effect": "Allow", "Action": "iot:Publish", "Resource": all("topic", &responses)},
            {
                "Effect": "Allow",
                "Action": "iot:Publish",
                "Resource": all("topic", &[
                    "controllers/self::aws-dm-controller/reply",
                    "controllers/self::aws-dm-controller/reply/reply-to=*",
                    UPDATE_REPORTS_TOPIC,
                ]),
                "Condition": {"Bool": {"iot:Connection.Thing.IsAttached": "true"}}
            }
        ]
    })
    .to_string()
}

/// Which devices to remove.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selection {
    /// Those that [`numbered`] has named so.
    Prefix(String),
    /// Those of a thing group, and the group if it was made here and is empty then.
    ThingGroup(String),
}

impl Selection {
    fn names(&self, thing: &str) -> bool {
        match self {
            Self::ThingGroup(_) => true,
            // Not every thing that happens to begin so: only what ends in a number of at least four digits.
            Self::Prefix(prefix) => thing
                .strip_prefix(prefix.as_str())
                .and_then(|rest| rest.strip_prefix('-'))
                .is_some_and(|number| number.len() >= 4 && number.bytes().all(|byte| byte.is_ascii_digit())),
        }
    }
}

/// How much was removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CleanedUp {
    /// Things.
    pub things: usize,
    /// Certificates.
    pub certificates: usize,
    /// Policies.
    pub policies: usize,
    /// Thing groups.
    pub thing_groups: usize,
    /// Folders on this machine.
    pub folders: usize,
}

/// Removes devices with their certificates, and the policies and groups that were made for them and that nothing
/// else uses. `certificates`: the folder from which the devices' folders are removed too. What is gone already
/// is no error.
pub async fn cleanup(
    client: &Client,
    selection: &Selection,
    certificates: Option<&Path>,
    on_device: impl Fn(&ThingName),
) -> Result<CleanedUp, ProvisionError> {
    let things = list_things(client, selection).await?;
    let mut result = CleanedUp::default();
    let mut policies: BTreeSet<String> = BTreeSet::new();
    if let Selection::Prefix(prefix) = selection {
        policies.insert(own_policy_name(prefix));
    }
    let mut groups: BTreeSet<String> = BTreeSet::new();
    if let Selection::ThingGroup(group) = selection {
        groups.insert(group.clone());
    }
    let jobs = things.into_iter().map(|thing| {
        let client = client.clone();
        async move { remove_device(&client, thing).await }
    });
    bounded(jobs, |removed: RemovedDevice| {
        result.things += 1;
        result.certificates += removed.certificates;
        policies.extend(removed.policies);
        groups.extend(removed.groups);
        if let Some(parent) = certificates
            && std::fs::remove_dir_all(parent.join(removed.thing.as_str())).is_ok()
        {
            result.folders += 1;
        }
        on_device(&removed.thing);
    })
    .await?;
    for policy in policies {
        result.policies += usize::from(remove_policy(client, &policy).await?);
    }
    for group in groups {
        result.thing_groups += usize::from(remove_group(client, &group).await?);
    }
    Ok(result)
}

/// The name of the policy that provisioning makes for a prefix when no other is given.
pub fn own_policy_name(prefix: &str) -> String {
    format!("{prefix}-device")
}

async fn list_things(client: &Client, selection: &Selection) -> Result<Vec<ThingName>, ProvisionError> {
    let mut names = Vec::new();
    match selection {
        Selection::Prefix(_) => {
            let mut pages = client.list_things().into_paginator().send();
            while let Some(page) = pages.next().await {
                let page = page.map_err(failed("the things cannot be listed"))?;
                names.extend(page.things.unwrap_or_default().into_iter().filter_map(|thing| thing.thing_name));
            }
        }
        Selection::ThingGroup(group) => {
            let mut pages = client.list_things_in_thing_group().thing_group_name(group).into_paginator().send();
            while let Some(page) = pages.next().await {
                match page {
                    Ok(page) => names.extend(page.things.unwrap_or_default()),
                    Err(error) if has_code(&error, NOT_FOUND) => break,
                    Err(error) => return Err(failed(format!("the group {group} cannot be listed"))(error)),
                }
            }
        }
    }
    Ok(names.iter().filter(|name| selection.names(name)).filter_map(|name| name.parse().ok()).collect())
}

struct RemovedDevice {
    thing: ThingName,
    certificates: usize,
    /// The policies that its certificates had.
    policies: Vec<String>,
    /// The groups that it was in.
    groups: Vec<String>,
}

async fn remove_device(client: &Client, thing: ThingName) -> Result<RemovedDevice, ProvisionError> {
    let name = thing.as_str();
    let mut removed = RemovedDevice { thing: thing.clone(), certificates: 0, policies: vec![], groups: vec![] };
    let groups = client.list_thing_groups_for_thing().thing_name(name).send().await;
    removed.groups = match groups {
        Ok(groups) => {
            groups.thing_groups.unwrap_or_default().into_iter().filter_map(|group| group.group_name).collect()
        }
        Err(error) if has_code(&error, NOT_FOUND) => vec![],
        Err(error) => return Err(failed(format!("the groups of {name} cannot be listed"))(error)),
    };
    for principal in principals(client, name).await? {
        removed.policies.extend(remove_certificate(client, name, &principal).await?);
        removed.certificates += 1;
    }
    retried(format!("the thing {name} cannot be removed"), || async {
        match client.delete_thing().thing_name(name).send().await {
            // Deleting what is gone succeeds; detaching is not seen everywhere at once.
            Err(error) if has_code(&error, INVALID_REQUEST) => Err(Again(error)),
            Err(error) => Ok(Err(error)),
            Ok(_) => Ok(Ok(())),
        }
    })
    .await?;
    Ok(removed)
}

async fn principals(client: &Client, thing: &str) -> Result<Vec<String>, ProvisionError> {
    let mut pages = client.list_thing_principals().thing_name(thing).into_paginator().send();
    let mut principals = Vec::new();
    while let Some(page) = pages.next().await {
        match page {
            Ok(page) => principals.extend(page.principals.unwrap_or_default()),
            Err(error) if has_code(&error, NOT_FOUND) => break,
            Err(error) => return Err(failed(format!("the certificates of {thing} cannot be listed"))(error)),
        }
    }
    Ok(principals)
}

/// Detaches a certificate from everything and deletes it. Returns the policies that it had.
async fn remove_certificate(client: &Client, thing: &str, principal: &str) -> Result<Vec<String>, ProvisionError> {
    let what = format!("the certificate of {thing} cannot be removed");
    let Some((_, id)) = principal.split_once(":cert/") else {
        return Err(ProvisionError::new(what, format!("{principal} is no certificate")));
    };
    let attached = client.list_attached_policies().target(principal).send().await.map_err(failed(&what))?;
    let policies: Vec<_> = attached.policies.unwrap_or_default().into_iter().filter_map(|p| p.policy_name).collect();
    for policy in &policies {
        client.detach_policy().policy_name(policy).target(principal).send().await.map_err(failed(&what))?;
    }
    let detach = client.detach_thing_principal().thing_name(thing).principal(principal);
    detach.send().await.map_err(failed(&what))?;
    let deactivate = client.update_certificate().certificate_id(id).new_status(CertificateStatus::Inactive);
    deactivate.send().await.map_err(failed(&what))?;
    retried(what, || async {
        match client.delete_certificate().certificate_id(id).send().await {
            Err(error) if has_code(&error, DELETE_CONFLICT) || has_code(&error, CERTIFICATE_STATE) => Err(Again(error)),
            Err(error) if has_code(&error, NOT_FOUND) => Ok(Ok(())),
            Err(error) => Ok(Err(error)),
            Ok(_) => Ok(Ok(())),
        }
    })
    .await?;
    Ok(policies)
}

/// A failure that passes by itself.
struct Again<E>(E);

/// Calls until the answer is no passing failure, with growing pauses.
async fn retried<E, R, F>(what: String, call: impl Fn() -> F) -> Result<(), ProvisionError>
where
    E: std::error::Error + 'static,
    R: std::fmt::Debug + 'static,
    F: Future<Output = Result<Result<(), SdkError<E, R>>, Again<SdkError<E, R>>>>,
{
    let mut pause = Duration::from_millis(250);
    for _ in 1..REMOVALS {
        match call().await {
            Ok(result) => return result.map_err(failed(what)),
            Err(Again(_)) => tokio::time::sleep(pause).await,
        }
        pause *= 2;
    }
    call().await.unwrap_or_else(|Again(error)| Err(error)).map_err(failed(what))
}

/// Removes a policy that was made here and is not attached any more; true if it was.
async fn remove_policy(client: &Client, name: &str) -> Result<bool, ProvisionError> {
    let what = format!("the policy {name} cannot be removed");
    let arn = match client.get_policy().policy_name(name).send().await {
        Ok(policy) => policy.policy_arn.unwrap_or_default(),
        Err(error) if has_code(&error, NOT_FOUND) => return Ok(false),
        Err(error) => return Err(failed(what)(error)),
    };
    let tags = client.list_tags_for_resource().resource_arn(arn).send().await.map_err(failed(&what))?;
    if !tags.tags().contains(&created_by()?) {
        return Ok(false);
    }
    match client.delete_policy().policy_name(name).send().await {
        Ok(_) => Ok(true),
        // Other devices have it.
        Err(error) if has_code(&error, DELETE_CONFLICT) => Ok(false),
        Err(error) => Err(failed(what)(error)),
    }
}

/// Removes a group that was made here and is empty; true if it was.
async fn remove_group(client: &Client, name: &str) -> Result<bool, ProvisionError> {
    let what = format!("the thing group {name} cannot be removed");
    let group = match client.describe_thing_group().thing_group_name(name).send().await {
        Ok(group) => group,
        Err(error) if has_code(&error, NOT_FOUND) => return Ok(false),
        Err(error) => return Err(failed(what)(error)),
    };
    let (key, value) = CREATED_BY;
    let attributes = group.thing_group_properties.and_then(|properties| properties.attribute_payload);
    let is_ours =
        attributes.and_then(|payload| payload.attributes).is_some_and(|all| all.get(key).is_some_and(|v| v == value));
    let members = client.list_things_in_thing_group().thing_group_name(name).max_results(1).send().await;
    let is_empty = members.map_err(failed(&what))?.things().is_empty();
    if !is_ours || !is_empty {
        return Ok(false);
    }
    client.delete_thing_group().thing_group_name(name).send().await.map_err(failed(what))?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::{OperationId, ReplyTo, Response, Step, StepOutcome, settings};

    #[test]
    fn further_attributes_are_checked_as_the_registry_would() {
        assert_eq!(attribute("model=wo:v8"), Ok(("model".to_owned(), "wo:v8".to_owned())));
        assert_eq!(attribute("a=b=c").unwrap().1, "b=c");
        assert_eq!(attribute("FW=").unwrap().1, "");
        assert!(attribute(&format!("aZ0_.,@/:#-{}={}", "x".repeat(117), "[=]".repeat(266))).is_ok());
        let long_name = format!("{}=a", "x".repeat(129));
        let long_value = format!("a={}", "x".repeat(801));
        for (bad, why) in [
            ("model", "\"model\": expected NAME=VALUE"),
            ("=x", "\"\" is no attribute's name: expected 1 to 128 characters of"),
            ("a b=c", "\"a b\" is no attribute's name"),
            ("a[=c", "\"a[\" is no attribute's name"),
            (&long_name, "is no attribute's name"),
            ("FW=2 27", "\"2 27\" is no attribute's value: expected at most 800 characters of"),
            ("FW=\u{e9}", "is no attribute's value"),
            (&long_value, "is no attribute's value"),
        ] {
            let error = attribute(bad).unwrap_err();
            assert!(error.contains(why), "{bad}: {error}");
        }
        for own in ["protocol", "firmwareVersion", "externalId", "createdBy"] {
            assert_eq!(attribute(&format!("{own}=x")), Err(format!("{own} is set by the simulator itself")));
        }
    }

    fn map<T: FromIterator<(String, String)>>(pairs: &[(&str, &str)]) -> T {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn an_existing_thing_gets_what_is_asked_for_and_what_it_lacks() {
        let known = map(&[("FW", "failedtoupdate"), ("model", "wo:v8"), ("old", "x")]);
        let further: BTreeMap<_, _> = map(&[("FW", "2.27"), ("model", "wo:v8"), ("externalId", "user-1")]);
        // The cloud has changed FW: only who asks for it gets it back.
        assert_eq!(changes(&known, further.clone(), &map(&[])), map(&[("externalId", "user-1")]));
        let asked = map(&[("FW", "2.27"), ("model", "wo:v8"), ("old", ""), ("never", "")]);
        let expected = map(&[("FW", "2.27"), ("externalId", "user-1"), ("old", "")]);
        assert_eq!(changes(&known, further, &asked), expected);
    }

    #[test]
    fn a_device_keeps_its_attributes_beside_new_ones() {
        let folder = tempfile::tempdir().unwrap();
        let identity = Identity {
            thing: "sim-0001".parse().unwrap(),
            protocol: ProtocolName::Json,
            firmware_version: "1.0.0".into(),
            certificate_id: Some("1".into()),
            attributes: map(&[("FW", "2.27"), ("model", "wo:v8"), ("old", "x")]),
        };
        write_identity(folder.path(), &with_attributes(identity, &map(&[("FW", "2.28"), ("old", "")]))).unwrap();
        let kept = Identity::read(folder.path()).unwrap();
        assert_eq!(kept.attributes, map(&[("FW", "2.28"), ("model", "wo:v8")]));
        assert_eq!(kept.certificate_id.as_deref(), Some("1"));
    }

    #[test]
    fn a_cleanup_by_prefix_takes_only_numbered_names() {
        let selection = Selection::Prefix("sim".into());
        assert!(selection.names("sim-0001") && selection.names("sim-12345"));
        for other in ["sim-pump", "sim-1", "simple-0001", "sim0001", "sim-00x1", "my-sim-0001"] {
            assert!(!selection.names(other), "{other}");
        }
        assert_eq!(numbered("sim", 2).unwrap()[1].as_str(), "sim-0002");
        assert!(numbered("si/m", 1).is_err());
    }

    #[test]
    fn mixed_devices_speak_both_protocols() {
        let mix: ProtocolMix = "mixed".parse().unwrap();
        assert_eq!([mix.of(0), mix.of(1)], [ProtocolName::Json, ProtocolName::Usp]);
        assert!("xml".parse::<ProtocolMix>().unwrap_err().contains("expected json, usp or mixed"));
    }

    /// Everything that the encodings make a device subscribe to and publish on is allowed, for its own thing only.
    #[test]
    fn the_policy_allows_what_devices_do_and_no_more() {
        let document: serde_json::Value = serde_json::from_str(&policy_document("arn:aws:iot:eu-west-1:1")).unwrap();
        let thing: ThingName = "sim-0001".parse().unwrap();
        let allows = |action: &str, resource: &str| {
            document["Statement"].as_array().unwrap().iter().filter(|s| s["Action"] == action).any(|statement| {
                let patterns = statement["Resource"].as_array().cloned().unwrap_or(vec![statement["Resource"].clone()]);
                patterns.iter().any(|pattern| {
                    let pattern =
                        pattern.as_str().unwrap().replace("${iot:Connection.Thing.ThingName}", thing.as_str());
                    let resource = format!("arn:aws:iot:eu-west-1:1:{resource}");
                    pattern.strip_suffix('*').map_or(pattern == resource, |start| resource.starts_with(start))
                })
            })
        };
        assert!(allows("iot:Connect", "client/sim-0001"));
        assert!(!allows("iot:Connect", "client/sim-0002"));
        for name in ProtocolName::ALL {
            let encoding = name.encoding();
            assert!(allows("iot:Subscribe", &format!("topicfilter/{}", encoding.command_filter(&thing))));
            let operation_id: OperationId = "op-1".parse().unwrap();
            let command = protocol::Command::CancelDownload { operation_id: operation_id.clone() };
            let request = encoding.encode_command(&thing, None, &command, 0);
            assert!(allows("iot:Receive", &format!("topic/{}", request.topic)));
            let received = encoding.decode_command(&request.topic, &request.payload).unwrap().unwrap();
            for step in Step::ALL {
                let outcome = StepOutcome::Succeeded { firmware_version: None };
                let response = Response { operation_id: operation_id.clone(), step, outcome };
                let answer = encoding.encode_response(&thing, &response, &received.reply_to, 0).unwrap();
                assert!(allows("iot:Publish", &format!("topic/{}", answer.topic)), "{}", answer.topic);
            }
            let boot = encoding.encode_boot(&thing, "1.0.0", 0);
            assert!(allows("iot:Publish", &format!("topic/{}", boot.topic)));
            assert_eq!(received.reply_to == ReplyTo::default(), name == ProtocolName::Json);
        }
        assert!(allows("iot:Publish", &format!("topic/{UPDATE_REPORTS_TOPIC}")));
        let [request, response] = [settings::request_topic(&thing), settings::response_topic(&thing)];
        assert!(allows("iot:Subscribe", &format!("topicfilter/{request}")));
        assert!(allows("iot:Receive", &format!("topic/{request}")));
        assert!(allows("iot:Publish", &format!("topic/{response}")));
        assert!(!allows("iot:Publish", &format!("topic/{request}")));
        for other in ["firmware_resp", "config_resp"] {
            assert!(!allows("iot:Publish", &format!("topic/devices/sim-0002/{other}")));
        }
    }

    #[test]
    fn an_external_id_names_its_thing() {
        let thing: ThingName = "sim-0001".parse().unwrap();
        assert_eq!(external_id("user-{thing}", &thing), "user-sim-0001");
        assert_eq!(external_id("household", &thing), "household");
    }

    #[test]
    fn a_key_is_kept_when_it_is_certified_again() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("private.key");
        let thing: ThingName = "sim-0001".parse().unwrap();
        let (key, request) = signing_request(&thing, &file).unwrap();
        assert!(request.starts_with("-----BEGIN CERTIFICATE REQUEST-----"));
        write_file(&file, key.as_bytes(), 0o600).unwrap();
        assert_eq!(signing_request(&thing, &file).unwrap().0, key);
    }
}
