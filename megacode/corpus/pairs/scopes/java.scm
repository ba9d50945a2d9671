[(method_declaration) (constructor_declaration) (lambda_expression)] @function
[
  (block) (for_statement) (enhanced_for_statement) (try_with_resources_statement) (catch_clause)
  (switch_block_statement_group) (switch_rule)
] @block
[
  (class_declaration) (record_declaration) (interface_declaration) (enum_declaration)
  (object_creation_expression (class_body))
] @class

(identifier) @word
(type_identifier) @typeword

(method_declaration name: (identifier) @name)
(class_declaration name: (identifier) @typename)
(record_declaration name: (identifier) @typename)
(interface_declaration name: (identifier) @typename)
(enum_declaration name: (identifier) @typename)
(type_parameter (type_identifier) @type)
(formal_parameter name: (identifier) @var)
(lambda_expression parameters: (identifier) @var)
(inferred_parameters (identifier) @var)
(variable_declarator name: (identifier) @var)
(enhanced_for_statement name: (identifier) @var)
(resource name: (identifier) @var)
(catch_formal_parameter name: (identifier) @var)
(instanceof_expression name: (identifier) @var)
(type_pattern (identifier) @var)
(record_pattern_component (_) (identifier) @var)

(method_invocation name: (identifier) @keep)
(method_invocation !object name: (identifier) @call)
(field_access field: (identifier) @keep)
(method_reference (_) (identifier) @keep)
(scoped_type_identifier (_) (type_identifier) @keep)
(marker_annotation name: (identifier) @keep)
(annotation name: (identifier) @keep)
(element_value_pair key: (identifier) @keep)
(record_declaration parameters: (formal_parameters (formal_parameter name: (identifier) @fixed)))
(enum_constant name: (identifier) @fixed)
(labeled_statement . (identifier) @label)
(break_statement (identifier) @label)
(continue_statement (identifier) @label)
