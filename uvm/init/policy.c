/* SPDX-License-Identifier: Apache-2.0
 *
 * The text has exactly one form: keys in their order, no white space, no number with a leading zero. So there is
 * nothing that two readers could take differently, and the parser is a walk over what must come next.
 */
#include "policy.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static const struct format formats[] = {
    {"tar-index", 512, 4096, "TARINDEX"},
    {"tar-index-parents", 512, 4096, "TARPARNT"},
    {"erofs-4k", 4096, 4096, "EROFS-4K"},
    {"erofs-4k-parents", 4096, 4096, "EROFS4KP"},
    {"tarfs", 4096, 4096, NULL},
    {"tarfs-index", 512, 4096, NULL},
};

struct reader {
    char *start, *at, *end;
    char error[160];
};

static int __attribute__((format(printf, 2, 3))) wrong(struct reader *r, const char *text, ...)
{
    if (!r->error[0]) { /* the first one counts */
        int used = snprintf(r->error, sizeof r->error, "policy, byte %zu: ", (size_t)(r->at - r->start));
        va_list arguments;
        va_start(arguments, text);
        vsnprintf(r->error + used, sizeof r->error - (size_t)used, text, arguments);
        va_end(arguments);
    }
    return 0;
}

static int starts_with(const struct reader *r, const char *text)
{
    size_t size = strlen(text);
    return (size_t)(r->end - r->at) >= size && memcmp(r->at, text, size) == 0;
}

static int expect(struct reader *r, const char *text)
{
    if (!starts_with(r, text))
        return wrong(r, "expected %s", text);
    r->at += strlen(text);
    return 1;
}

static int hex_digit(char c)
{
    return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* A string, with its NUL, in place: it never gets longer. The escapes are \" and \\, and \u00XX below a blank. */
static char *string(struct reader *r)
{
    if (!expect(r, "\""))
        return NULL;
    char *result = r->at, *to = r->at;
    while (r->at < r->end && *r->at != '"') {
        unsigned char c = (unsigned char)*r->at;
        if (c < 0x20)
            return wrong(r, "control character in a string"), NULL;
        if (c == '\\') {
            if (starts_with(r, "\\\"") || starts_with(r, "\\\\")) {
                c = (unsigned char)r->at[1];
                r->at += 1;
            } else {
                int high = -1, low = -1;
                if (starts_with(r, "\\u00") && r->end - r->at >= 6) {
                    high = hex_digit(r->at[4]);
                    low = hex_digit(r->at[5]);
                }
                if (high < 0 || high > 1 || low < 0 || (high == 0 && low == 0))
                    return wrong(r, "escape that is not \\\", \\\\ or \\u0001 to \\u001f"), NULL;
                c = (unsigned char)(high << 4 | low);
                r->at += 5;
            }
        }
        r->at += 1;
        *to++ = (char)c;
    }
    if (!expect(r, "\""))
        return NULL;
    *to = 0; /* at the latest where the closing quote was */
    return result;
}

static int number(struct reader *r, uint64_t *value)
{
    const char *first = r->at;
    *value = 0;
    while (r->at < r->end && *r->at >= '0' && *r->at <= '9' && r->at - first < 16)
        *value = *value * 10 + (uint64_t)(*r->at++ - '0');
    if (r->at == first || (*first == '0' && r->at - first > 1) || *value > 1ULL << 53)
        return wrong(r, "expected a whole number up to 2^53");
    return 1;
}

static int strings(struct reader *r, char **list)
{
    if (!expect(r, "["))
        return 0;
    size_t count = 0;
    if (!starts_with(r, "]"))
        for (;;) {
            if (count == STRINGS_MAX)
                return wrong(r, "more than %d strings", STRINGS_MAX);
            if (!(list[count] = string(r)))
                return 0;
            count += 1;
            if (!starts_with(r, ","))
                break;
            r->at += 1;
        }
    list[count] = NULL;
    return expect(r, "]");
}

/* What can be the serial of a disk: into `to`, of SERIAL_BYTES_MAX + 1 bytes. */
static int serial(struct reader *r, char *to)
{
    const char *name = string(r);
    if (!name)
        return 0;
    if (!*name || strlen(name) > SERIAL_BYTES_MAX || name[strspn(name, "abcdefghijklmnopqrstuvwxyz0123456789-")])
        return wrong(r, "a name has 1 to %d of a-z, 0-9 and -", SERIAL_BYTES_MAX);
    strcpy(to, name);
    return 1;
}

static int parse_layer(struct reader *r, struct policy *policy)
{
    struct layer *layer = &policy->layers[policy->layer_count];
    uint64_t data_block, hash_block;
    const char *name = layer->name, *format, *root_hash;

    if (!expect(r, "{\"name\":") || !serial(r, layer->name))
        return 0;
    for (size_t i = 0; i < policy->layer_count; i++)
        if (strcmp(policy->layers[i].name, name) == 0)
            return wrong(r, "two layers have the name %s", name);

    if (!expect(r, ",\"format\":") || !(format = string(r)))
        return 0;
    layer->format = NULL;
    for (size_t i = 0; i < sizeof formats / sizeof *formats; i++)
        if (strcmp(formats[i].name, format) == 0)
            layer->format = &formats[i];
    if (!layer->format)
        return wrong(r, "layer %s has a format that is not known", name);

    if (!expect(r, ",\"root_hash\":") || !(root_hash = string(r)))
        return 0;
    if (strlen(root_hash) != 2 * DIGEST_BYTES || strspn(root_hash, "0123456789abcdef") != 2 * DIGEST_BYTES)
        return wrong(r, "the root hash of layer %s is not 64 hexadecimal digits", name);
    strcpy(layer->root_hash_hex, root_hash);
    for (size_t i = 0; i < DIGEST_BYTES; i++)
        layer->root_hash[i] = (uint8_t)(hex_digit(root_hash[2 * i]) << 4 | hex_digit(root_hash[2 * i + 1]));

    if (!expect(r, ",\"data_size\":") || !number(r, &layer->data_size) || !expect(r, ",\"data_block\":") ||
        !number(r, &data_block) || !expect(r, ",\"hash_block\":") || !number(r, &hash_block) || !expect(r, "}"))
        return 0;
    if (data_block != layer->format->data_block || hash_block != layer->format->hash_block)
        return wrong(r, "layer %s has blocks of %llu and %llu bytes, format %s has %u and %u", name,
                      (unsigned long long)data_block, (unsigned long long)hash_block, layer->format->name,
                      layer->format->data_block, layer->format->hash_block);
    if (layer->data_size < 8192 || layer->data_size % hash_block)
        return wrong(r, "the data of layer %s is no whole number of hash blocks, or less than two", name);
    policy->layer_count += 1;
    return 1;
}

static int parse(struct reader *r, struct policy *policy)
{
    if (!expect(r, "{\"version\":1,"))
        return 0;
    if (starts_with(r, "\"disk\":") && (!expect(r, "\"disk\":") || !serial(r, policy->disk) || !expect(r, ",")))
        return 0;
    if (!expect(r, "\"layers\":["))
        return 0;
    for (;;) {
        if (policy->layer_count == LAYERS_MAX)
            return wrong(r, "more than %d layers", LAYERS_MAX);
        if (!parse_layer(r, policy))
            return 0;
        if (!starts_with(r, ","))
            break;
        r->at += 1;
    }
    if (!expect(r, "],\"process\":{\"args\":") || !strings(r, policy->args) || !expect(r, ",\"env\":") ||
        !strings(r, policy->env) || !expect(r, ",\"cwd\":") || !(policy->cwd = string(r)) ||
        !expect(r, ",\"user\":") || !(policy->user = string(r)) || !expect(r, "}}"))
        return 0;
    if (r->at != r->end)
        return wrong(r, "something follows the policy");
    if (!policy->args[0] || !*policy->args[0])
        return wrong(r, "there is no command");
    if (policy->cwd[0] != '/')
        return wrong(r, "the working directory is no absolute path");
    return 1;
}

const char *policy_parse(char *text, size_t size, struct policy *policy)
{
    static struct reader r;
    r = (struct reader){text, text, text + size, ""};
    policy->layer_count = 0;
    policy->disk[0] = 0;
    return parse(&r, policy) ? NULL : r.error;
}

int policy_digest_named(const char *cmdline, uint8_t digest[DIGEST_BYTES])
{
    static const char key[] = "tardev.policy=sha256:";
    size_t size = strcspn(cmdline, "\n");
    if (size != sizeof key - 1 + 2 * DIGEST_BYTES || strncmp(cmdline, key, sizeof key - 1) != 0)
        return 0;
    const char *hex = cmdline + sizeof key - 1;
    for (size_t i = 0; i < DIGEST_BYTES; i++) {
        int high = hex_digit(hex[2 * i]), low = hex_digit(hex[2 * i + 1]);
        if (high < 0 || low < 0)
            return 0;
        digest[i] = (uint8_t)(high << 4 | low);
    }
    return 1;
}
